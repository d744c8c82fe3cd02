"""Coverage-guided fuzzing of everything that reads a stranger's bytes. Optional: pip install 'pixcell[fuzz]'."""
