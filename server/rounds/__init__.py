"""Federated rounds: ask, screen every reply, sum, commit, and begin again where the last commit left off."""
