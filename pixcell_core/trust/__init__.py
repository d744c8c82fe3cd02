"""Keys, signed envelopes, the Merkle log and their verification: pure, offline, no network."""
