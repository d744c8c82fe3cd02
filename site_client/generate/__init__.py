"""Surrogates: conditions chosen by the study's policy, tiles drawn by the federated model."""
