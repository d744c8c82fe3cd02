"""Central pretraining: the coordinator continues the base model on public tiles before the rounds begin."""
