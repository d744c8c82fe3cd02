"""Patient-level differential privacy: noise, the DP-SGD engine, accounting, a check of the mechanism."""
