"""Measures of images and features: distances between sets, similarity of pairs, probes and studies, patients held out."""
