"""One hospital: slides become tiles, features, private fine-tuning, surrogates, and a release that was audited."""
