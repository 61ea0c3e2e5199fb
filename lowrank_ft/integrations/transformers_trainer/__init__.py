"""Guidance in ``transformers.Trainer`` and TRL."""
