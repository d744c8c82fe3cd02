"""Keys, signed envelopes, the Merkle log and its verification. Pure and offline: no network, no clock of its own."""
