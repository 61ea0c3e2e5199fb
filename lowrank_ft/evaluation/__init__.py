"""Perplexity, agreement with a baseline, and tasks."""
