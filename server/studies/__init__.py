"""Studies of the coordinator: written once, shown, never changed."""
