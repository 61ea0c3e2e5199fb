"""Read the options of a run: a YAML file, and command-line flags that override it."""

import argparse
import copy
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import yaml
from transformers import HfArgumentParser

from lowrank_ft.errors import ConfigError
from lowrank_ft.reading import read_yaml
from lowrank_ft.training.options import DataArguments, ModelArguments, TrainArguments, option_names
from lowrank_ft.training.values import checked

_FINETUNE: tuple[Any, ...] = (ModelArguments, DataArguments, TrainArguments)
_ELSEWHERE = {
    "model_name_or_path": "--model", "train_file": "--dataset", "dataset_name": "--dataset",
    "validation_file": "--eval-dataset", "max_length": "--block-size", "max_seq_length": "--block-size",
    "bf16": "--mixed-precision bf16", "fp16": "--mixed-precision fp16", "torch_dtype": "--dtype",
    "eval_strategy": "--eval-steps", "save_strategy": "--save-steps", "warmup_steps": "--warmup-ratio",
    "overwrite": "--overwrite-output-dir", "push_to_hub": "lowrank-ft push, after the run",
    "hub_model_id": "lowrank-ft push --repo-id, after the run",
}  # fmt: skip
"""Names of transformers' and TRL's options to what does the same here."""
_MAPPINGS = {"rank_pattern": "{q_proj: 64, .*mlp.*: 128}", "config_overrides": "{num_hidden_layers: 4}"}


def parse_args(
    argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[ModelArguments, DataArguments, TrainArguments]:
    """Options of fine-tuning, see :func:`parse_groups`.

    Raises:
        ConfigError: the file cannot be read, holds an unknown option, or a value is out of range.
    """
    model, data, train = parse_groups(_FINETUNE, argv, description)
    if not model.model:
        raise ConfigError("no model is named; give --model a folder or a Hub id, or --config a file that says it")
    if data.distill_dataset and not train.distill_weight:
        raise ConfigError(
            f"distill_dataset {data.distill_dataset} is named, and distill_weight 0 would not use it; "
            "set --distill-weight above 0 and at most 1, or leave it out"
        )
    if model.guide == "dense" and train.trainable != "all":
        raise ConfigError(
            f"trainable is {train.trainable}, and a dense guide is trained in full; choose the guide residual or none"
        )
    return model, data, train


def parse_groups(
    groups: Sequence[Any], argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[Any, ...]:
    """One instance of each group, from ``--config FILE.yaml`` and flags; a flag wins over the file.

    Args:
        groups: dataclasses of options. A field that may be a dict is written as YAML on the command line.

    Raises:
        ConfigError: the file cannot be read, holds an unknown option, or a value is out of range.
    """
    parser = _Parser(list(groups), description=description, allow_abbrev=False, formatter_class=_Help)
    parser.usage = (
        f"lowrank-ft {Path(sys.argv[0]).stem} [--config FILE.yaml] [--OPTION VALUE ...] [-- options of accelerate]"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="options, one `name: value` a line; flags override it")
    arguments = list(sys.argv[1:] if argv is None else argv)
    config, _ = _config_parser().parse_known_args(arguments)
    if config.config:
        parser.set_defaults(**read_config(config.config, groups))
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(f"there is no option {unknown[0]}; {_hint(unknown[0].lstrip('-').partition('=')[0], groups)}")
    namespace = vars(options)
    for name in _MAPPINGS:
        if isinstance(namespace.get(name), str):
            namespace[name] = _mapping(name, namespace[name])
    hints = _hints(groups)
    namespace = {name: checked(name, v, hints[name]) if name in hints else v for name, v in namespace.items()}
    return tuple(group(**{name: namespace[name] for name in option_names(group)}) for group in groups)


def read_config(path: str | Path, groups: Sequence[Any] = _FINETUNE) -> dict[str, Any]:
    """The options of a YAML file, their names and types checked."""
    options = read_yaml(path, ConfigError, "--config")
    hints = _hints(groups)
    for name in options:
        if name not in hints:
            raise ConfigError(f"--config {path}: there is no option {name!r}; {_hint(str(name), groups)}")
    return {name: checked(name, value, hints[name], f"--config {path}: ") for name, value in options.items()}


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


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Options with hyphens, as on every other command, though underscores are read, too; and defaults where there are any."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = list(dict.fromkeys(s.replace("_", "-") for s in action.option_strings))
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[0].startswith("--no_"):
            return f"turn off {action.option_strings[-1].removeprefix('--no-').replace('_', '-')}"
        return action.help if action.default in (None, "") else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def _config_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _hints(groups: Sequence[Any]) -> dict[str, Any]:
    """The type of every option."""
    return {f.name: get_type_hints(group)[f.name] for group in groups for f in fields(group)}


def _hint(name: str, groups: Sequence[Any]) -> str:
    if (ours := _ELSEWHERE.get(name.replace("-", "_"))) is not None:
        return f"here it is {ours}"
    near = difflib.get_close_matches(name, option_names(*groups), n=3, cutoff=0.5)
    return f"did you mean {', '.join(near)}?" if near else "see --help for all of them"


def _mapping(option: str, text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{option} {text!r} is no mapping; write it as '{_MAPPINGS[option]}'")
    return value
