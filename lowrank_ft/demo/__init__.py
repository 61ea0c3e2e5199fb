"""The whole path on a small model and a text that need no network."""
