"""Training from scratch with low rank from the first step."""
