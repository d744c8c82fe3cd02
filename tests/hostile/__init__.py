"""Named bad inputs, and the script that writes the larger ones."""
