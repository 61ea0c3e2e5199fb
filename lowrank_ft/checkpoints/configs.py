"""A ``config.json`` that somebody else wrote, checked before transformers builds anything from it.

What is of the wrong type, or so large that building it would not end, is refused by name. For the rest transformers
has checks of its own; :func:`blamed` finds the field that they stumble over.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowrank_ft.errors import CheckpointError, first_line
from lowrank_ft.factorization.pivoting import SIDES
from lowrank_ft.reading import kind_of, read_object

_COUNTS = re.compile(r"(^|_)(layers?|heads?|experts|blocks)$")
_SIZES = re.compile(r"(size|dim|embd|inner|positions?|position_embeddings|ctx|labels|d_model|d_ff|d_kv)$")
_AT_LEAST_ONE = ("num_hidden_layers", "num_attention_heads", "hidden_size", "n_layer", "n_head", "n_embd", "vocab_size")
_COUNTS_ALWAYS = 1024  # of layers, heads or experts: so many are built at once whatever the weights are
_SIZES_ALWAYS = 2**24
_SECONDS_TO_BLAME = 5.0
_TEXTS = ("model_type", "transformers_version", "_name_or_path", "torch_dtype", "dtype")
_TABLES = ("auto_map", "id2label", "label2id", "quantization_config", "text_config", "vision_config", "rope_scaling")


def read_config_file(path: Path, shapes: Callable[[], list[tuple[int, ...]]]) -> dict[str, Any]:
    """The object in a ``config.json``, the types of its fields and their sizes checked.

    Args:
        shapes: gives the shapes of the checkpoint's tensors; asked only where a size is unusual. Empty: not known.

    Raises:
        CheckpointError: it is no object, or a field cannot be; both are named.
    """
    config = read_object(path, CheckpointError)
    _check_types(path, config)
    known: list[tuple[int, ...]] | None = None
    for name, value in _whole_numbers(config):
        field = name.rpartition(".")[2]
        if field in _AT_LEAST_ONE and value < 1:
            raise CheckpointError(f"{path}: {name} is {value}; it must be 1 or more")
        is_count = _COUNTS.search(field) is not None
        if value <= (_COUNTS_ALWAYS if is_count else _SIZES_ALWAYS):
            continue
        known = shapes() if known is None else known
        if is_count:
            allowed, of = max(_COUNTS_ALWAYS, len(known)), f"the checkpoint has {len(known)} tensors"
        else:
            largest = max((_elements(shape) for shape in known), default=0)
            allowed, of = max(_SIZES_ALWAYS, largest), f"the largest tensor has {largest} values"
        if value > allowed:
            raise CheckpointError(
                f"{path}: {name} is {value:.6g}, and {of}; at most {allowed} can be right. Correct it, or download "
                "the file again"
            )
    return config


def blamed(fields: Mapping[str, Any], build: Callable[[dict[str, Any]], Any]) -> str | None:
    """The field without which ``build`` does not fail, or None; looked for no longer than some seconds."""
    until = time.monotonic() + _SECONDS_TO_BLAME
    for name in fields:
        if name in ("model_type", "architectures") or time.monotonic() > until:
            continue
        try:
            build({k: v for k, v in fields.items() if k != name})
        except Exception:
            continue
        return name
    return None


def refused(where: object, fields: Mapping[str, Any], build: Callable[[dict[str, Any]], Any], error: Exception) -> str:
    """The sentence about a config that transformers stumbles over."""
    reason = f"{type(error).__name__}: {in_one_line(error)}"
    name = blamed(fields, build)
    if name is None:
        return f"{where} describes no model that can be built ({reason}); correct it, or download it again"
    shown = repr(fields[name])
    return f"{where}: {name} is {shown[:80]}, which transformers refuses ({reason}); correct it"


def in_one_line(error: BaseException) -> str:
    """An error's first sentences, without the lines that say where in C++ it was raised."""
    text = " ".join(str(error).partition("Exception raised from")[0].split())
    return text[:300] or first_line(error)


def _check_types(path: Path, config: Mapping[str, Any]) -> None:
    def wrong(name: str, value: Any, allowed: str) -> CheckpointError:
        return CheckpointError(f"{path}: {name} is {kind_of(value)}; it must be {allowed}")

    for name in _TEXTS:
        if not isinstance(config.get(name), str | None):
            raise wrong(name, config[name], "a text")
    for name in _TABLES:
        if not isinstance(config.get(name), dict | None):
            raise wrong(name, config[name], "an object")
    architectures = config.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)
    ):
        raise wrong("architectures", architectures, "a list of names of classes")
    for name, reference in (config.get("auto_map") or {}).items():
        parts = reference if isinstance(reference, list) else [reference]
        if not all(isinstance(part, str | None) for part in parts):
            raise wrong(f"auto_map.{name}", reference, "a text")
    entry = config.get("quantization_config") or {}
    for name in ("quant_method", "base_model", "base_revision"):
        if not isinstance(entry.get(name), str | None):
            raise wrong(f"quantization_config.{name}", entry[name], "a text")
    if entry.get("quant_method") == "lowrank":
        version, ranks = entry.get("format_version", 1), entry.get("ranks", {})
        if not isinstance(version, int):
            raise wrong("quantization_config.format_version", version, "a whole number")
        if not isinstance(ranks, dict):
            raise wrong("quantization_config.ranks", ranks, "an object with the rank of every factored linear")
        for name, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool):
                raise wrong(f"quantization_config.ranks[{name!r}]", rank, "a whole number")
            if not 1 <= rank < 2**31:
                raise CheckpointError(
                    f"{path}: quantization_config.ranks[{name!r}] is {rank:.6g}; it is not positive, or no rank"
                )
        if not isinstance(entry.get("quantized"), dict | None):
            raise wrong("quantization_config.quantized", entry["quantized"], "the object of another library")
        pivots = entry.get("pivots") or {}
        if not isinstance(pivots, dict):
            raise wrong("quantization_config.pivots", pivots, "an object with the side of every pivoted linear")
        for name, side in pivots.items():
            if side not in SIDES:
                raise wrong(f"quantization_config.pivots[{name!r}]", side, " or ".join(SIDES))


def _whole_numbers(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """The counts and sizes in a config and in the configs inside."""
    for name, value in config.items():
        if isinstance(value, dict) and name not in ("id2label", "label2id", "quantization_config"):
            yield from _whole_numbers(value, f"{prefix}{name}.")
        elif isinstance(value, bool) or not (_COUNTS.search(name) or _SIZES.search(name)):
            continue
        elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            yield f"{prefix}{name}", int(value)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
