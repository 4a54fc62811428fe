"""Checkpoints that are converted once, for all later loads."""
