"""The guided phase and its end, for our :class:`Trainer` and for :class:`GuidanceCallback` in somebody else's.

guided      alpha falls with the step; evaluations skip the guides, for what counts is the model that will be left
the drop    the guides leave model, optimizer, DDP and FSDP2
compact     from here on this is the compact model, and so are its checkpoints
"""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lowrank_ft.data.examples import IGNORED, TokenizedData, collate
from lowrank_ft.errors import TrainingStateError
from lowrank_ft.evaluation.perplexity import Evaluation, predicted_tokens, summed_loss
from lowrank_ft.nn import compact_view, end_guidance, guided_layers, set_alpha, set_gates
from lowrank_ft.nn.modes import without_cache
from lowrank_ft.schedule import alpha_at
from lowrank_ft.training import fsdp


def guide_step(model: nn.Module, step: int, guided_steps: int, schedule: str, gates: int | None = None) -> float:
    """Set the guides for optimizer step ``step``; returns alpha. Past the guided phase there is nothing to set.

    Args:
        gates: the seed of stochastic guidance; None computes every guide.
    """
    alpha = alpha_at(step, guided_steps, schedule)
    set_alpha(model, alpha)
    if gates is not None:
        set_gates(model, step, alpha, gates)
    return alpha


def require_guides(model: nn.Module, checkpoint: str | Path, advice: str) -> None:
    """A model that goes on from a checkpoint of the guided phase must have its guides.

    Raises:
        TrainingStateError: it has none.
    """
    if not any(guided_layers(model)):
        raise TrainingStateError(f"{checkpoint} is of the guided phase, and this model has no guide; {advice}")


def drop_guides(model: nn.Module, optimizer: Any, rewrap: Callable[[], None]) -> int:
    """Take the guides from model, optimizer and whatever spreads the model over processes, and free their memory.

    Args:
        model: sharded under FSDP2, the inner one under DDP.
        optimizer: accelerate's or torch's, or None before there is one.
        rewrap: is called where there were guides and no units of FSDP2, for :func:`remake_ddp`.

    Returns:
        Bytes of parameters that were let go.
    """
    had_guides = any(guided_layers(model))
    fsdp.reshard(model)  # after an evaluation parameters may be gathered, and not those that the optimizer has
    units = fsdp.guide_units(model)
    freed = end_guidance(model, getattr(optimizer, "optimizer", optimizer))
    if units:
        fsdp.forget_units(model, units)
    elif had_guides:
        rewrap()
    del units
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return freed


def remake_ddp(accelerator: Accelerator, held: nn.Module) -> None:
    """Let DDP forget the guides. Nothing happens where ``held`` is no DDP.

    DDP holds every parameter that it was made with, and waits for the gradients of those that had one, so it has to be
    made anew. But the running loop of transformers' Trainer has the old wrapper in a local variable, which nobody can
    exchange. So the old object is emptied, and takes over the attributes of the new one: both are the same wrapper.
    """
    if not isinstance(held, DistributedDataParallel):
        return
    # Mixed precision wraps forward, and would do so twice.
    bare = accelerator.unwrap_model(held, keep_fp32_wrapper=False)
    accelerator._models.clear()  # accelerate keeps a reference, and has no way to drop one model
    vars(held).clear()  # with its reducer go the hooks on the gradients
    gc.collect()
    fresh = accelerator.prepare_model(bare)
    object.__setattr__(held, "__dict__", vars(fresh))


def skip_guides_in_evaluation(model: nn.Module) -> list[RemovableHandle]:
    """In evaluation mode a guided layer computes what its export would; in training mode nothing changes."""
    handles: list[RemovableHandle] = []
    for _, layer in guided_layers(model):
        handles += [
            layer.register_forward_pre_hook(_hide_guide),
            layer.register_forward_hook(_show_guide, always_call=True),
        ]
    return handles


def _hide_guide(layer: Any, _: Any) -> None:
    if not layer.training:
        layer.guide_enabled = False


def _show_guide(layer: Any, *_: Any) -> None:
    if not layer.training:
        layer.guide_enabled = True


def evaluate_compact(model: nn.Module, data: TokenizedData, batch_size: int, accelerator: Accelerator) -> Evaluation:
    """Mean loss per token of what would be exported, the guides skipped; the model is left in training mode.

    Args:
        model: the bare one. DDP has nothing to do in evaluation, and FSDP2 works inside the model.
        batch_size: examples per process and forward pass.
    """
    total = torch.zeros(2, dtype=torch.float64)
    start = time.perf_counter()
    model.eval()
    call: Any = model
    with torch.no_grad(), compact_view(model), accelerator.autocast():
        for batch in _batches(data, batch_size, accelerator.process_index, accelerator.num_processes):
            labels = batch.pop("labels").to(accelerator.device)
            logits = call(**send_to_device(batch, accelerator.device), **without_cache(model)).logits
            total += torch.tensor([summed_loss(logits, labels).item(), predicted_tokens(labels)])
    if fsdp.uses_fsdp(accelerator):
        fsdp.reshard(model)
    model.train()
    sums: Any = accelerator.reduce(total.to(accelerator.device, torch.float32), "sum")
    loss, tokens = sums.tolist()
    return Evaluation(loss / tokens, int(tokens), tokens / (time.perf_counter() - start))


def _batches(data: TokenizedData, batch_size: int, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
    """This process's share; equally many batches on all, for sharded parameters are gathered by all together.

    Where examples run out, a batch is one that counts nowhere.
    """
    longest = -(-len(data) // world)
    mine = list(range(rank, len(data), world))
    for i in range(0, longest, batch_size):
        indices = mine[i : i + batch_size]
        batch = collate([data[j] for j in indices or [0]])
        if not indices:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        yield batch
