"""Who belongs to the consortium: its certificate authority and the keys of its sites."""
