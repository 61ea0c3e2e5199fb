"""Checkpoints: where they come from, how they load, how they are written and pushed."""
