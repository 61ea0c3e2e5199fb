"""Turn parsed flags into the library's arguments; shared by the commands."""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from lowrank_ft.errors import ConfigError, RankError
from lowrank_ft.hub.source import Source
from lowrank_ft.targets import ALL_LINEAR, Patterns


def source_of(options: argparse.Namespace, name: str | None = None) -> Source:
    """The model that the command line names."""
    if name is not None:  # a second model: revision and token belong to the first
        return Source(name, None, options.trust_remote_code)
    return Source(options.model, options.revision, options.trust_remote_code, options.token)


def size_options(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of ``make_plan`` that the command line gives."""
    return {
        "rank": options.rank,
        "param_ratio": options.param_ratio,
        "energy": options.energy,
        "rank_pattern": rank_pattern(options.rank_pattern),
        "target_modules": patterns(options.target_modules),
        "exclude_modules": patterns(options.exclude_modules),
        "allow_past_break_even": options.allow_past_break_even,
    }


def patterns(values: list[str] | None) -> Patterns | None:
    """One value with a regular expression's characters is an expression for whole names, as a string is in PEFT."""
    if values is None:
        return None
    if len(values) == 1 and (values[0] == ALL_LINEAR or re.search(r"[*+?|()\[\]^$\\]", values[0])):
        return values[0]
    return values


def rank_pattern(values: list[str] | None) -> dict[str, int | float]:
    """``["q_proj=64", "mlp.*=0.25"]`` to a mapping.

    Raises:
        RankError: an item is not of the form PATTERN=N.
    """
    table: dict[str, int | float] = {}
    for item in values or []:
        pattern, _, number = item.rpartition("=")
        try:
            table[pattern] = int(number) if number.lstrip("+-").isdigit() else float(number)
        except ValueError:
            pattern = ""
        if not pattern:
            raise RankError(f"--rank-pattern {item!r} is not of the form PATTERN=N, such as q_proj=64")
    return table


def device_of(options: argparse.Namespace) -> str:
    """The device that was asked for, or the best there is.

    Raises:
        ConfigError: torch does not know it, or cannot use it here.
    """
    if options.device is None:
        return str(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {options.device} cannot be used: {str(error).splitlines()[0]}") from None
    return str(options.device)


def dtype_of(options: argparse.Namespace) -> str | torch.dtype:
    return "auto" if options.dtype == "auto" else getattr(torch, options.dtype)


def folder_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def hub_target(options: argparse.Namespace) -> str | None:
    """The repository to push to, checked before any work is done."""
    if not options.push_to_hub:
        return None
    if not options.hub_model_id:
        raise ConfigError("--push-to-hub needs --hub-model-id, such as me/llama-lowrank")
    return str(options.hub_model_id)
