"""Patient-level differential privacy: noise, the DP-SGD engine, accounting, and the check of the mechanism itself."""
