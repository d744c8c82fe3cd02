"""Measurements on a consortium of real processes over mutual TLS on loopback: kills, and the cost of a round."""
