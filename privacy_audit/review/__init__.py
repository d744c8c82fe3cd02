"""Shows the blinded queue of a finished audit to a pathologist, on this machine alone, and signs what was decided."""
