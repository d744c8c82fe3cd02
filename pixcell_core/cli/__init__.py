"""The command contract: envelope, exit codes, progress, and the loader of the other packages' commands."""
