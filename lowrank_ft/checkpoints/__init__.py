"""Checkpoints: reading, writing, loading and publishing them."""
