"""Masked sums: the primitives, one site's side of the protocol and the hub's; no network and no clock."""
