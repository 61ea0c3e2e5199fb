"""``lowrank-ft plan --preset``, and the training FLOPs that ``plan --tokens`` adds."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from lowrank_ft_cli.arguments import count

from lowrank_ft.checkpoints.architecture import writes_text
from lowrank_ft.console import human_count, print_table
from lowrank_ft.costs.accounting import Accounting
from lowrank_ft.costs.flops import TrainingCost
from lowrank_ft.data.examples import DEFAULT_BLOCK_SIZE
from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.ranks import dense_parameters, trained_parameters
from lowrank_ft.pretraining.presets import Preset, preset

_ABOUT_PRESETS = {"preset", "set", "rank", "tokens", "sequence_length", "json"}


def show_preset(options: argparse.Namespace, given: list[str]) -> None:
    """Print size and cost of a preset, dense and with its rank.

    Args:
        given: names of the options that do not have their default.

    Raises:
        ConfigError: one of them is about a model's weights, and would have no effect.
    """
    _refuse_other_flags(options, given)
    made = preset(options.preset, **overrides(options))
    models = {"dense": made.dense.accounting()} | ({} if made.rank is None else {"low-rank": made.accounting()})
    if options.json:
        found = {name.replace("-", "_"): asdict(a) for name, a in models.items()}
        print(json.dumps({"preset": {**asdict(made), "steps": made.steps}, **found}, indent=2))
        return
    print_accounting(models)
    print(f"shape     {_shape(made)}")
    print(
        f"tokens    {human_count(made.tokens)}: {made.steps:,} steps of {made.sequences_per_step} x "
        f"{made.sequence_length} tokens"
    )
    shape = (made.intermediate_size, made.hidden_size)
    if made.rank is not None and trained_parameters(shape, made.rank) >= dense_parameters(shape):
        print(f"note      rank {made.rank} takes as many FLOPs in training as the dense model, or more")


def print_accounting(models: dict[str, Accounting]) -> None:
    """One row per model."""
    rows = [(n, millions(a.parameters), millions(a.ffn_parameters), flops(a.training_flops)) for n, a in models.items()]
    print_table(("model", "parameters", "FFN", "training FLOPs"), rows)


def sequence_length_of(options: argparse.Namespace, config: Any, name: str) -> int | None:
    """The context that ``--tokens`` is counted at; None where no training is asked about.

    Raises:
        ConfigError: a flag that goes with another one stands alone, the model is no causal language model, or the
            context is longer than it allows.
    """
    if options.set:
        raise ConfigError("--set changes values of a preset, and no --preset is given; edit the model's config.json")
    if options.tokens is None:
        if options.sequence_length is not None:
            raise ConfigError("--sequence-length applies to training FLOPs; add --tokens")
        return None
    if not writes_text(config):
        found = (getattr(config, "architectures", None) or ["model without architectures in its config.json"])[0]
        raise ConfigError(f"--tokens counts the training of causal language models, and {name} is a {found}")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = options.sequence_length or min(DEFAULT_BLOCK_SIZE, positions or DEFAULT_BLOCK_SIZE)
    if positions is not None and length > positions:
        raise ConfigError(f"--sequence-length {length} exceeds the {positions} positions of {name}; lower it")
    return int(length)


def print_training_cost(cost: TrainingCost, tokens: int, sequence_length: int) -> None:
    """The table, and what it leaves out."""
    print_accounting({"dense": cost.dense, "low-rank": cost.low_rank})
    share = cost.low_rank.training_flops / cost.dense.training_flops
    print(
        f"training  {human_count(tokens)} tokens in sequences of {sequence_length}: "
        f"{share:.1%} of the dense model's FLOPs"
    )
    for left_out in cost.uncounted:
        print(f"note      not in the FLOPs: {left_out}")


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Values of the preset that the command line replaces.

    Raises:
        ConfigError: an item of ``--set`` is not of the form NAME=VALUE, or a value is given twice.
    """
    values: dict[str, Any] = {}
    for item in options.set or []:
        name, _, text = item.partition("=")
        name = name.replace("-", "_")
        if not name or not text:
            raise ConfigError(f"--set {item!r} is not of the form NAME=VALUE, such as hidden_size=512")
        if name in values or getattr(options, name, None) is not None:
            raise ConfigError(f"{name} is given twice; say it once, with --set or with its own flag")
        values[name] = _value(text)
    flags = {n: getattr(options, n) for n in ("rank", "tokens", "sequence_length")}
    return values | {n: v for n, v in flags.items() if v is not None}


def flops(number: int) -> str:
    """``1.69e18``"""
    return f"{number:.2e}".replace("e+", "e")


def millions(parameters: int) -> str:
    """``1274 M``, as in the papers' tables; three digits below 10 M."""
    return f"{parameters / 1e6:.0f} M" if parameters >= 10_000_000 else human_count(parameters)


def _value(text: str) -> Any:
    words = {"none": None, "dense": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return float(text) if text.startswith("0.") or text == "1.0" else count(text)
    except (argparse.ArgumentTypeError, ValueError):
        return text  # the preset says what is wrong with it


def _refuse_other_flags(options: argparse.Namespace, given: list[str]) -> None:
    if options.model is not None:
        raise ConfigError(f"give a model or --preset, not both; found {options.model} and {options.preset}")
    for name in given:
        if name not in _ABOUT_PRESETS:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} applies to a model, not to a preset; leave it out, or change the preset with --set"
            )


def _shape(made: Preset) -> str:
    heads = f"{made.num_attention_heads} heads"
    if made.num_key_value_heads != made.num_attention_heads:
        heads += f", {made.num_key_value_heads} for keys and values,"
    ffn = "dense" if made.rank is None else f"rank {made.rank}"
    first = " from the second block on" if made.rank is not None and made.dense_first_block else ""
    return (
        f"hidden {made.hidden_size}, {made.num_hidden_layers} blocks, {heads} of {made.head_dim}, "
        f"FFN {made.intermediate_size} ({ffn}{first}), vocabulary {made.vocab_size}"
    )
