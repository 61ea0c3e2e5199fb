"""Turn parsed flags into the library's arguments; shared by the commands."""

import argparse
import math
import re
from dataclasses import fields, replace
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.conversion.promise import Promise
from lowrank_ft.errors import ConfigError, RankError, first_line
from lowrank_ft.evaluation.compare import EvaluationSettings
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.factorization.targets import as_patterns


def source_of(options: argparse.Namespace, name: str | None = None) -> Source:
    """The model that the command line names."""
    if name is not None:  # a second model: revision and token belong to the first
        return Source(name, None, options.trust_remote_code)
    adapter = getattr(options, "adapter", False)
    return Source(options.model, options.revision, options.trust_remote_code, options.token, adapter)


def size_options(options: argparse.Namespace) -> SizeOptions:
    """The arguments of ``make_plan`` that the command line gives."""
    return replace(
        _filled(SizeOptions, options),
        rank_pattern=rank_pattern(options.rank_pattern),
        target_modules=as_patterns(options.target_modules),
        exclude_modules=as_patterns(options.exclude_modules),
    )


def promise_of(options: argparse.Namespace) -> Promise | None:
    """What may be lost at most, where that is asked for instead of a size.

    Raises:
        ConfigError: it is no such number, or a size is given as well.
    """
    if options.max_loss is None and options.max_kl is None:
        return None
    name, typed = ("--max-loss", options.max_loss) if options.max_kl is None else ("--max-kl", options.max_kl)
    kept = {"rank": options.rank, "param-ratio": options.param_ratio, "energy": options.energy, "plan": options.plan}
    given = [flag for flag, value in kept.items() if value is not None]
    given += ["rank-pattern"] if options.rank_pattern else []
    if given:
        raise ConfigError(f"{name} finds the size; leave --{given[0]} out")
    if options.method == "svd" or options.allocation not in (None, "loss"):
        raise ConfigError(f"{name} needs calibration and allocation by loss; leave --method svd and --allocation out")
    if options.max_kl is not None:
        amount = float(typed)
    else:
        try:
            amount = float(typed.removesuffix("%")) / (100 if typed.endswith("%") else 1)
        except ValueError:
            amount = math.nan
        if amount > 1 and not typed.endswith("%"):
            raise ConfigError(
                f"--max-loss is {typed}, which lets perplexity rise by {amount:.0%}; for {typed} % write {typed}%"
            )
    if not 0 < amount < math.inf:
        raise ConfigError(
            f"{name} is {typed}; it must be a number above 0, such as {'5%' if name == '--max-loss' else 0.1}"
        )
    most = math.log1p(amount) if options.max_kl is None else amount
    return Promise("loss" if options.max_kl is None else "kl", most, f"{name} {typed}")


def calibration_options(options: argparse.Namespace) -> CalibrationOptions:
    return _filled(CalibrationOptions, options)


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


def dtypes_of(options: argparse.Namespace, config: Any, device: str) -> tuple[torch.dtype | None, str | torch.dtype]:
    """What is written (None: what is computed in), and what is computed in.

    A CPU computes in float32, which is more precise there and often faster; a GPU in what the checkpoint has.
    """
    chosen = dtype_of(options)
    if isinstance(chosen, torch.dtype):
        return chosen, torch.float32 if device == "cpu" else chosen
    stored = getattr(config, "dtype", None)
    if isinstance(stored, torch.dtype):
        return stored, torch.float32 if device == "cpu" else stored
    return None, chosen


def evaluation_settings(options: argparse.Namespace) -> EvaluationSettings:
    return _filled(EvaluationSettings, options)


def _filled(kind: Any, options: argparse.Namespace) -> Any:
    """A dataclass from the flags of the same names; where a command has no such flag, the field has its default."""
    return kind(**{f.name: getattr(options, f.name, f.default) for f in fields(kind)})


def hub_target(options: argparse.Namespace) -> str | None:
    """The repository to push to, checked before any work is done."""
    if not options.push_to_hub:
        return None
    if not options.hub_model_id:
        raise ConfigError("--push-to-hub needs --hub-model-id, such as me/llama-lowrank")
    try:
        validate_repo_id(options.hub_model_id)
    except HFValidationError as error:
        raise ConfigError(f"--hub-model-id {options.hub_model_id!r}: {first_line(error)}") from None
    return str(options.hub_model_id)


def shard_size(options: argparse.Namespace) -> str:
    """The largest weight file, checked before any work is done."""
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGTkmgt]?i?B", options.max_shard_size):
        raise ConfigError(f"--max-shard-size {options.max_shard_size!r} is no size; write it as 5GB or 500MB")
    return str(options.max_shard_size)


def shard_bytes(options: argparse.Namespace) -> int:
    """The same as a number of bytes."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(I?)B", shard_size(options).upper())
    assert match is not None
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))
