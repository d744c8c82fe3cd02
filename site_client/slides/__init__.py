"""Slides in: read whole-slide images, find the tissue, cut and judge tiles, or write procedural slides."""
