"""Calibration: fit factors to what a model computes on real text, block by block and then end to end."""

from lowrank_ft.conversion.blockwise import METHODS, convert_blocks
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.distill import distill
from lowrank_ft.conversion.record import ConversionRecord
from lowrank_ft.conversion.sampling import sample_blocks
from lowrank_ft.conversion.sensitivity import squared_spectra

__all__ = [
    "METHODS",
    "Calibration",
    "ConversionRecord",
    "convert_blocks",
    "distill",
    "sample_blocks",
    "squared_spectra",
]
