"""Calibration: fit factors to what a model computes on real text, block by block and then end to end."""
