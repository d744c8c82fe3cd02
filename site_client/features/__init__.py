"""Tiles become features: pixels, latents, embeddings per patient, in the train and holdout stores."""
