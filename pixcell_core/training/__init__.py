"""Training the model: feature stores and layouts, adapters, the trainer, its stages, moving averages."""
