"""Text on its way to training: sources, token ids, token files, and the examples of a step."""
