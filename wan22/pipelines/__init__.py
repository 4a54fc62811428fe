"""Pipelines: from a prompt to a video."""
