"""Groups of arguments that several commands share, and the kinds of values they take.

Nothing heavy is imported here, for ``--help`` answers at once.
"""

import argparse
import re
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.factorization.options import SizeOptions


def add_model(parser: argparse.ArgumentParser, or_preset: bool = False) -> None:
    """The model, and how it is opened."""
    model = parser.add_argument("model", help="folder or Hub id of the model")
    if or_preset:
        parser.add_argument(
            "--preset", metavar="NAME", action=_InPlaceOf, replaces=model,
            help="instead of MODEL, a model of Wei et al. (2024): wei2024-{s,m,l,xl}[-r63|-r32] or wei2024-{m,l}-wide",
        )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--token", help="Hub token (default: the stored one)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code in the checkpoint")
    parser.add_argument(
        "--adapter", action="store_true", help="merge the PEFT adapter in the same folder into the weights"
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """How much is kept, and of which linears."""
    add_fields(parser, SizeOptions)


def add_calibration(parser: argparse.ArgumentParser, leave_out: Collection[str] = ()) -> None:
    """How factors are found, and what they are fitted to."""
    add_fields(parser, CalibrationOptions, leave_out)


def add_fields(parser: argparse.ArgumentParser, declared: Any, leave_out: Collection[str] = ()) -> None:
    """A flag for each field of a dataclass, as its metadata describe it: ``help``, ``group`` and ``metavar``."""
    groups: dict[str, Any] = {}
    for field in fields(declared):
        if field.name in leave_out:
            continue
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        help = field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            groups[title].add_argument(_flag(field.name), action="store_true", help=help)
            continue
        shown = help if field.default is None else f"{help} (default: {field.default})"
        groups[title].add_argument(
            _flag(field.name), default=field.default, metavar=field.metadata["metavar"], help=shown,
            **({"action": "append"} if field.metadata.get("repeated") else _KINDS[field.type]),
        )  # fmt: skip


def add_text(parser: argparse.ArgumentParser, help: str, batches_of: str = "blocks") -> None:
    """A text to measure on, and how it is cut."""
    parser.add_argument("--data", help=help)
    parser.add_argument("--data-split", default="test", help="split of a dataset on the Hub (default: test)")
    parser.add_argument("--data-config", help="configuration of a dataset on the Hub")
    parser.add_argument("--text-column", default="text", help="column that holds the text (default: text)")
    parser.add_argument("--block-size", type=int, help="tokens per sequence (default: 1024, or the limit of the model)")
    limit = "default: 8; of a text on a CPU, at most 2048 tokens at once"
    parser.add_argument("--batch-size", type=int, default=8, help=f"{batches_of} per forward pass ({limit})")


def add_output(parser: argparse.ArgumentParser, suffix: str) -> None:
    """Where the result goes."""
    parser.add_argument(
        "--output-dir", help=f"folder for the result, written completely or not at all (default: NAME-{suffix})"
    )
    parser.set_defaults(output_suffix=suffix)
    parser.add_argument(
        "--overwrite",
        "--overwrite-output-dir",
        action="store_true",
        help="replace an earlier checkpoint in the output folder",
    )
    parser.add_argument("--max-shard-size", default="5GB", help="size limit of each weight file (default: 5GB)")


def add_dtype(parser: argparse.ArgumentParser, default: str = "that of the checkpoint") -> None:
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help=f"dtype of the weights (default: {default})",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda or mps, if available)")


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Whether the result is pushed, and to where."""
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--push-to-hub", action="store_true", help="push the result to the Hub")
    hub.add_argument("--hub-model-id", help="name of the repository, such as me/llama-lowrank")
    hub.add_argument("--private", action="store_true", help="make a new repository private")


def number(text: str) -> int | float:
    """``64`` is a rank, ``0.5`` a fraction."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def share(text: str) -> float:
    """``0.8``, or ``80%``."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def count(text: str) -> int:
    """``2.2B`` is 2,200,000,000; the suffixes are k, M, B and T.

    Raises:
        argparse.ArgumentTypeError: not such a number, not whole, or not positive.
    """
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?([kMBT]?)", text.replace("_", "").replace(",", ""))
    if found:
        whole, fraction, scale = found[1], found[2] or "", 10 ** (3 * " kMBT".index(found[3] or " "))
        result, rest = divmod(int(whole + fraction) * scale, 10 ** len(fraction))
        if result > 0 and not rest:
            return result
    raise argparse.ArgumentTypeError(f"{text!r} is no positive whole number such as 1024, 300M or 2.2B")


# The type of a field, and what argparse calls it.
_KINDS: dict[Any, dict[str, Any]] = {
    str: {},
    str | None: {},
    int: {"type": int},
    int | None: {"type": int},
    float | None: {"type": share},
    int | float | None: {"type": number},
    str | list[str] | None: {"nargs": "+"},
    dict[str, int | float] | None: {"nargs": "+"},
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class _InPlaceOf(argparse.Action):
    """A flag that makes a positional argument unnecessary (one that may always be left out would be lost after flags)."""

    def __init__(self, *args: Any, replaces: argparse.Action, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.replaces = replaces

    def __call__(self, parser: argparse.ArgumentParser, options: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(options, self.dest, values)
        self.replaces.required = False
