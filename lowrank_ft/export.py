"""Write a compact checkpoint: safetensors, config, tokenizer, the loader for people without this package, a card.

The folder loads with ``AutoModel`` after ``import lowrank_ft``, or with ``trust_remote_code=True`` where the package
is not installed. Without either, loading stops with an error.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_ft.checkpoints.adapters import refuse_adapters
from lowrank_ft.checkpoints.assemble import assemble
from lowrank_ft.checkpoints.atomic import whole_folder
from lowrank_ft.checkpoints.companions import copy_companions
from lowrank_ft.checkpoints.format import CONVERSION_FILE, RANK_MAP_FILE, describe_in_config
from lowrank_ft.checkpoints.models import check_finite, check_written
from lowrank_ft.checkpoints.plugin import AUTO_MAP, PLUGIN_FILE, plugin_source
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.costs.flops import compare
from lowrank_ft.errors import CheckpointError, first_line
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.nn.forms import require_float_factors, stored_as
from lowrank_ft.report.model_card import dense_card, model_card
from lowrank_ft.report.plots import save_rank_map


def save_compact(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    companions_from: str | Path | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    results: Mapping[str, object] | None = None,
    command: str | None = None,
    conversion: Mapping[str, object] | None = None,
    from_scratch: bool = False,
    keep_existing: bool = False,
    form: str = "pivoted",
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``model`` without its guides as a compact checkpoint; the folder appears whole or not at all.

    The model stays as it is, so its training can go on, but for ``dtype``.

    Args:
        companions_from: a folder whose tokenizer and processor files are copied along, and whose card names the licence.
        base_model: where the dense weights came from; kept in the config for later guided fine-tuning.
        results: rows for the model card, name to value.
        command: the command line that made it, for the model card.
        conversion: what a conversion did (``ConversionRecord.to_dict``), written as ``conversion.json``.
        from_scratch: it had low rank from its initialization on, which the model card says.
        keep_existing: the folder is that of a training run, whose other files stay.
        form: one of ``FORMS``: ``pivoted`` stores a rank in the fewest numbers (format version 2); ``factors`` stores
            ``U`` and ``V`` (version 1), which older releases read.
        dtype: cast the model to it. Pivoted factors are computed before, so they are rounded only once.

    Raises:
        CheckpointError: the model carries an adapter of PEFT, or what was written does not load again.
        TargetError: the factors are quantized; ``model.save_pretrained`` writes such a model.
        NonFiniteError: a weight holds NaN or infinity, as after a diverged training.
        OutputError: the folder may not be written.
    """
    refuse_adapters(model)
    for _, layer in lowrank_layers(model):
        require_float_factors(layer)
    check_finite(model)
    with _written_as(model, form, dtype, base_model), whole_folder(output_dir, overwrite, keep_existing) as folder:
        _save(model, folder, max_shard_size)
        _complete(model, folder, _path(companions_from), base_model, results, command, conversion, from_scratch)


def save_parts(
    model: PreTrainedModel,
    output_dir: str | Path,
    parts: Mapping[Path, Sequence[str]],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype | None = None,
    companions_from: str | Path | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
    conversion: Mapping[str, object] | None = None,
) -> None:
    """As :func:`save_compact`, for a model that was written block by block.

    Args:
        model: on the meta device.
        parts: files that are written already, with the names of their tensors.
        read: gives the tensors that are in none of them, by name.
        dtype: what the parts have, and the rest will have; None for that of the model.

    Raises:
        CheckpointError: what was written does not load again.
        OutputError: the folder may not be written.
    """
    bare: Any = model
    if dtype is not None:
        type(bare).to(bare, dtype)  # accelerate has put a method in its place that refuses
    describe_in_config(model, base_model)
    with whole_folder(output_dir, overwrite) as folder:
        _save(model, folder, "5GB", {})
        assemble(model, folder, parts, read)
        _complete(model, folder, _path(companions_from), base_model, None, command, conversion)


def _complete(
    model: PreTrainedModel,
    folder: Path,
    companions_from: Path | None,
    base_model: str | None,
    results: Mapping[str, object] | None,
    command: str | None,
    conversion: Mapping[str, object] | None,
    from_scratch: bool = False,
) -> None:
    """Check the weights that were written, and put everything else beside them."""
    check_written(folder, model)
    copy_companions(companions_from, folder)
    _warn_of_tokenizer(folder, companions_from)
    if conversion is not None:
        (folder / CONVERSION_FILE).write_text(json.dumps(conversion, indent=1) + "\n", encoding="utf-8")
    drawn = save_rank_map(compare(model).linears, folder / RANK_MAP_FILE)
    picture = RANK_MAP_FILE if drawn else None
    card = model_card(
        model, base_model=base_model, results=results, command=command, picture=picture, from_scratch=from_scratch,
        base_card=companions_from, datasets=_datasets(results, conversion),
    )  # fmt: skip
    (folder / "README.md").write_text(card, encoding="utf-8")


def _datasets(results: Mapping[str, object] | None, conversion: Mapping[str, object] | None) -> list[str]:
    """What the model was trained on, and what its conversion was calibrated on."""
    calibration = (conversion or {}).get("calibration")
    names = [(results or {}).get("dataset"), calibration.get("source") if isinstance(calibration, Mapping) else None]
    return list(dict.fromkeys(str(name) for name in names if name))


@contextmanager
def _written_as(model: PreTrainedModel, form: str, dtype: torch.dtype | None, base_model: str | None) -> Iterator[None]:
    """Inside, ``model`` and its config are as they are written; afterwards the layers are back, in ``dtype``."""
    bare: Any = model
    try:
        with stored_as(model, form, dtype):
            if dtype is not None:
                bare.to(dtype)
            describe_in_config(model, base_model)
            yield
    finally:
        if dtype is not None:
            bare.to(dtype)
        describe_in_config(model, base_model)


def save_dense(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    companions_from: str | Path | None = None,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    results: Mapping[str, object] | None = None,
    command: str | None = None,
    keep_existing: bool = False,
) -> None:
    """Write a stock dense checkpoint; the folder appears whole or not at all.

    Args:
        results, command: of a training from scratch, for a model card; without a command there is none.
        companions_from, keep_existing: see :func:`save_compact`.

    Raises:
        CheckpointError, NonFiniteError, OutputError: see :func:`save_compact`.
    """
    refuse_adapters(model)
    check_finite(model)
    with whole_folder(output_dir, overwrite, keep_existing) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        check_written(folder, model)
        copy_companions(_path(companions_from), folder)
        _warn_of_tokenizer(folder, _path(companions_from))
        if command is not None:
            (folder / "README.md").write_text(dense_card(model, results or {}, command), encoding="utf-8")


def _path(folder: str | Path | None) -> Path | None:
    return None if folder is None else Path(folder)


def _warn_of_tokenizer(folder: Path, origin: Path | None) -> None:
    """Weights are worth keeping without a tokenizer, but whoever loads them should not be the first to find out."""
    names = [n for n in ("tokenizer.json", "tokenizer_config.json") if (folder / n).is_file()]
    if not names or origin is None:
        return
    try:
        Source(str(folder)).load_tokenizer()
    except CheckpointError as error:
        warnings.warn(
            f"the tokenizer that came along from {origin} does not load ({first_line(error.__cause__ or error)}); copy "
            "tokenizer.json and tokenizer_config.json of its base model into the result",
            stacklevel=3,
        )


def _save(model: PreTrainedModel, folder: Path, max_shard_size: str, weights: dict[str, Tensor] | None = None) -> None:
    """Config, plugin and weights: those of the model, unless others are given."""
    config = model.config
    before = getattr(config, "auto_map", None)
    # A model with code of its own already uses this place; its checkpoint needs the package to load.
    if "AutoConfig" not in (before or {}):
        config.auto_map = {**(before or {}), **AUTO_MAP}
        (folder / PLUGIN_FILE).write_text(plugin_source(), encoding="utf-8")
    try:
        # Stock name conversions on save know nothing of factors and would scatter them.
        model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=False, state_dict=weights)
    finally:
        if before is not None:
            config.auto_map = before
        elif hasattr(config, "auto_map"):
            del config.auto_map
