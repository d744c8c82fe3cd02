"""A whole consortium on one machine: the demonstration and the end-to-end tests."""
