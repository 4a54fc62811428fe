"""Training data: files become clips, clips become latents and text tokens, and those become batches."""
