"""Calibration: fit factors to what a model computes on real text, block by block and then end to end."""

from lowrank_ft.calibration.blockwise import METHODS, convert_blocks
from lowrank_ft.calibration.config import Calibration
from lowrank_ft.calibration.distill import distill
from lowrank_ft.calibration.record import ConversionRecord
from lowrank_ft.calibration.sampling import sample_blocks
from lowrank_ft.calibration.sensitivity import squared_spectra

__all__ = [
    "METHODS",
    "Calibration",
    "ConversionRecord",
    "convert_blocks",
    "distill",
    "sample_blocks",
    "squared_spectra",
]
