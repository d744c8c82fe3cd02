"""Training the model: feature stores, adapters, the trainer, moving averages."""
