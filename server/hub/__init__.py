"""The hub: Flower's SuperLink embedded, a public door that opens to sites alone, an event log, and the run starter."""
