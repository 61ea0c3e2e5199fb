"""A model without weights gets the shape of a compact checkpoint, for loaders that fill models in place."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from lowrank_ft.checkpoints.architecture import is_compact
from lowrank_ft.checkpoints.loader import LowRankQuantizationConfig, LowRankQuantizer
from lowrank_ft.errors import CheckpointError
from lowrank_ft.nn import stored_form


def apply_config(model: PreTrainedModel) -> int:
    """Put factored layers, on the meta device, where ``model.config`` says that the checkpoint has them.

    ``from_pretrained`` does so itself. A model that was made from the config alone has dense linears, which the weights do
    not fit, so accelerate's ``load_checkpoint_and_dispatch`` needs this first.

    Args:
        model: made from the config of a compact checkpoint, on the meta device (``accelerate.init_empty_weights``).

    Returns:
        How many linears are factored now.

    Raises:
        CheckpointError: the config is not that of a compact checkpoint, the linears have weights already or are factored,
            or the model has none of them.
    """
    name = type(model).__name__
    if not is_compact(model.config):
        raise CheckpointError(
            f"the config of this {name} names no factored linears; make it from a compact checkpoint's"
        )
    if stored_form(model)[0]:
        raise CheckpointError(f"this {name} has factored linears already; apply the config to a fresh one")
    if not all(p.is_meta for p in model.parameters()):
        raise CheckpointError(
            f"this {name} has weights already, and factored layers would come without; make it inside "
            "accelerate.init_empty_weights(), or load it with from_pretrained"
        )
    entry: Any = model.config.quantization_config
    if _fields(entry).get("quantized"):
        raise CheckpointError(
            f"the checkpoint of this {name} is quantized, and its layers cannot be made without its weights; load it with "
            "from_pretrained"
        )
    put_layers(model, {k: v for k, v in _fields(entry).items() if k != "quant_method"})
    return len(stored_form(model)[0])


def put_layers(model: PreTrainedModel, entry: Mapping[str, Any]) -> None:
    """Put factored layers on the meta device in the place of dense linears.

    Args:
        entry: ``ranks`` and ``pivots``, as ``quantization_config`` has them.

    Raises:
        CheckpointError: the model has none of the linears.
    """
    try:
        LowRankQuantizer(LowRankQuantizationConfig(**entry), pre_quantized=True)._process_model_before_weight_loading(
            model
        )
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _fields(entry: Any) -> dict[str, Any]:
    return dict(entry if isinstance(entry, dict) else entry.to_dict())
