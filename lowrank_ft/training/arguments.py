"""Read the options of a run: a YAML file, and command-line flags that override it."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from lowrank_ft.errors import ConfigError
from lowrank_ft.training.config import DataArguments, ModelArguments, TrainArguments, option_names
from lowrank_ft.training.length import require_guided_phase

_GROUPS: tuple[Any, ...] = (ModelArguments, DataArguments, TrainArguments)


def parse_args(
    argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """Options from ``--config FILE.yaml`` and flags; a flag wins over the file.

    Raises:
        ConfigError: the file cannot be read, holds an unknown option, or a value is out of range.
    """
    parser = HfArgumentParser(list(_GROUPS), description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="options, one `name: value` a line; flags override it")
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, _ = _config_parser().parse_known_args(arguments)
    if config.config:
        parser.set_defaults(**read_config(config.config))
    namespace = vars(parser.parse_args(arguments))
    if isinstance(namespace.get("rank_pattern"), str):
        namespace["rank_pattern"] = _mapping(namespace["rank_pattern"])
    model, data, train = (group(**{name: namespace[name] for name in option_names(group)}) for group in _GROUPS)
    if not model.model:
        raise ConfigError("no model is named; give --model a folder or a Hub id, or --config a file that says it")
    if data.distill_dataset and not train.distill_weight:
        raise ConfigError(
            f"distill_dataset {data.distill_dataset} is named, and distill_weight 0 would not use it; "
            "set --distill_weight above 0 and at most 1, or leave it out"
        )
    if model.guide == "dense" and train.trainable != "all":
        raise ConfigError(
            f"trainable is {train.trainable}, and a dense guide is trained in full; "
            "choose the guide residual, frozen or none"
        )
    if model.guide == "none":
        require_guided_phase(train, "guide is none")
    return model, data, train


def read_config(path: str | Path) -> dict[str, Any]:
    """The options of a YAML file, their names checked."""
    try:
        options = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is no valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"--config {path} must hold `name: value` lines")
    known = option_names(*_GROUPS)
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else "see --help for all of them"
            raise ConfigError(f"--config {path}: there is no option {name!r}; {hint}")
    return options


def as_rank(value: float | str | None) -> int | float | None:
    """``64`` is a rank, ``0.5`` or ``1.0`` a fraction of full rank; as on the command line of ``lowrank-ft convert``.

    Raises:
        ConfigError: no number.
    """
    if not isinstance(value, str):
        return value
    try:
        return float(value) if "." in value or "e" in value.lower() else int(value)
    except ValueError:
        raise ConfigError(f"rank {value!r} is no number; give a whole number or a fraction of full rank") from None


def _config_parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"rank_pattern {text!r} is no mapping; write it as '{{q_proj: 64, .*mlp.*: 128}}'")
    return value
