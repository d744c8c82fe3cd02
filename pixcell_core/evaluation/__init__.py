"""Measures of images and features: probes with patients held out, signal-to-noise of reconstructions."""
