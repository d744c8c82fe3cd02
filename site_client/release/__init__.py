"""The gate: the only writer of bundles. Tiles are sealed, audited, signed, and only then leave, as one bundle."""
