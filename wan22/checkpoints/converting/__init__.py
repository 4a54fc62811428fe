"""Checkpoints in another layout or dtype."""
