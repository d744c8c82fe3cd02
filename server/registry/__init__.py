"""The coordinator's registry: one database of sites, studies, runs, rounds, heads and acts, checked as it is read."""
