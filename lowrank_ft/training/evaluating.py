"""Held-out loss of the compact model, spread over all processes."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from lowrank_ft.data.examples import IGNORED, TokenizedData, collate
from lowrank_ft.evaluation.perplexity import Evaluation, predicted_tokens, summed_loss
from lowrank_ft.nn import compact_view
from lowrank_ft.training.fsdp import reshard, uses_fsdp


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
            logits = call(**send_to_device(batch, accelerator.device)).logits
            total += torch.tensor([summed_loss(logits, labels).item(), predicted_tokens(labels)])
    if uses_fsdp(accelerator):
        reshard(model)
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
