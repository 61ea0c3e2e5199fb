"""Perplexity of a causal language model on packed blocks: ``exp`` of the mean loss per predicted token."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lowrank_ft.errors import ConfigError, DataError

DEFAULT_BLOCK_SIZE = 1024
IGNORED = -100
"""Label of a position that does not count, as everywhere in transformers."""


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, over ``tokens`` predicted tokens, at ``tokens_per_second`` (forward only)."""

    loss: float
    tokens: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a float


def context_length(wanted: int | None, positions: int | None, name: str) -> int:
    """Tokens per block: what was asked for, or 1024, or all ``positions`` of the model if those are fewer.

    Raises:
        ConfigError: more than the model has positions for, or fewer than 2.
    """
    if wanted is None:
        return min(DEFAULT_BLOCK_SIZE, positions or DEFAULT_BLOCK_SIZE)
    if wanted < 2:
        raise ConfigError(f"block size {wanted} is too small; it must be 2 or more")
    if positions is not None and wanted > positions:
        raise ConfigError(f"block size {wanted} exceeds the {positions} positions of {name}; lower --block-size")
    return wanted


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over the predicted positions.

    Args:
        logits: ``(batch, length, vocabulary)``.
        labels: ``(batch, length)``, not shifted; ``IGNORED`` where a token does not count.

    Returns:
        A float32 scalar.
    """
    predicted, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(predicted.float(), wanted, ignore_index=IGNORED, reduction="sum")


def predicted_tokens(labels: Tensor) -> int:
    """How many positions of ``labels (batch, length)`` count in :func:`summed_loss`."""
    return int((labels[:, 1:] != IGNORED).sum())


def to_blocks(ids: Tensor, block_size: int) -> Tensor:
    """Cut ``ids (tokens,)`` into ``(blocks, block_size)``; an incomplete last block is dropped, unless it is the only.

    Raises:
        DataError: fewer than two tokens, of which none can be predicted.
    """
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least 2")
    block_size = min(block_size, len(ids))
    blocks = len(ids) // block_size
    return ids[: blocks * block_size].view(blocks, block_size)


@torch.no_grad()
def evaluate_blocks(model: nn.Module, blocks: Tensor, batch_size: int = 8, progress: bool = False) -> Evaluation:
    """Loss of ``model`` on ``blocks (n, block_size)``; every token but a block's first is predicted."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    start = time.perf_counter()
    for batch in tqdm(blocks.split(batch_size), desc="evaluate", unit="batch", disable=None if progress else True):
        batch = batch.to(device)
        total += summed_loss(model(input_ids=batch).logits, batch).item()
        tokens += predicted_tokens(batch)
    seconds = time.perf_counter() - start
    model.train(was_training)
    return Evaluation(total / tokens, tokens, tokens / seconds)
