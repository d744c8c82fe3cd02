"""The trainer: slides, features and the GPU, and no network. It takes jobs from the spool and answers there."""
