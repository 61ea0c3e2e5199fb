"""How well a causal language model predicts a text, and how closely it follows another model on it.

Perplexity is ``exp`` of the mean loss per predicted token. Agreement is the mean of ``KL(p || q)`` over the same
positions, ``p`` being the next-token distribution of the baseline and ``q`` that of the model, and the share of the
positions where both rank the same token first.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.console import progress_bar
from lowrank_ft.data.encoding import with_begin, without_begin
from lowrank_ft.data.examples import IGNORED
from lowrank_ft.errors import ConfigError, DataError
from lowrank_ft.evaluation.divergence import divergence
from lowrank_ft.nn.modes import evaluating, without_cache

_CPU_TOKENS = 2_048
"""At once on a CPU, at most: more are no faster there, and their logits take gigabytes."""


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats per token, over ``tokens`` predicted tokens, at ``tokens_per_second`` (forward only)."""

    loss: float
    tokens: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp(710) overflows a float


@dataclass(frozen=True)
class Agreement:
    """How closely a model follows its baseline, over ``tokens`` predicted tokens.

    Attributes:
        kl: mean ``KL(baseline || model)``, in nats per predicted token; 0 where the distributions are the same.
        top1: share of the positions where both give the highest probability to the same token, 0 to 1.
    """

    kl: float
    top1: float
    tokens: int


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
    _require_two(ids)
    block_size = min(block_size, len(ids))
    blocks = len(ids) // block_size
    return ids[: blocks * block_size].view(blocks, block_size)


def windows(ids: Tensor, block_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Cut ``ids (tokens,)`` into overlapping windows, of which each counts only what the one before did not have.

    Below ``stride == block_size`` every token but the text's first is predicted once, with at least
    ``block_size - stride`` tokens before it. (Windows that do not overlap predict no first token, as blocks do.) The
    last window ends with the text and is filled up on its right, where a causal model does not look.

    Returns:
        The windows ``(n, block_size)``, which share the memory of one copy of ``ids``; and their labels
        ``(n, block_size)``, ``IGNORED`` where a token does not count.

    Raises:
        ConfigError: ``stride`` is below 1 or above ``block_size``.
        DataError: fewer than two tokens, of which none can be predicted.
    """
    if not 1 <= stride <= block_size:
        raise ConfigError(
            f"stride {stride} is out of range; it must be at least 1 and at most the block size {block_size}"
        )
    _require_two(ids)
    block_size = min(block_size, len(ids))
    count = 1 + math.ceil((len(ids) - block_size) / stride)
    padding = (count - 1) * stride + block_size - len(ids)
    blocks = F.pad(ids, (0, padding)).unfold(0, block_size, stride)
    labels = F.pad(ids, (0, padding), value=IGNORED).unfold(0, block_size, stride).clone()
    labels[1:, : block_size - stride] = IGNORED
    return blocks, labels


def sequences(
    ids: Tensor, block_size: int, stride: int | None = None, begin: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None]:
    """Cut ``ids (tokens,)`` into what a model reads: blocks or windows, each after the tokens that begin a text.

    A model that was trained with a begin-of-text token at the start of every sequence predicts badly without it. The
    token counts nowhere, and the first token after it no more than in blocks that begin without one.

    Args:
        stride: of overlapping :func:`windows`; None for :func:`to_blocks`.
        begin: ids with which the tokenizer begins a text, see :func:`lowrank_ft.data.encoding.text_ends`.

    Returns:
        Blocks ``(n, block_size)``; and labels of the same shape, or None where every token but a block's first counts.

    Raises:
        ConfigError: ``block_size`` is too small for ``begin`` and two tokens; or see :func:`windows`.
        DataError: see :func:`to_blocks`; or no token but those of ``begin`` could be predicted.
    """
    room = block_size - len(begin)
    if begin and room < 2:
        raise ConfigError(
            f"block size {block_size} is too small for a tokenizer that begins each text with {len(begin)} tokens of "
            f"its own; it must be at least {len(begin) + 2}"
        )
    ids = without_begin(ids, begin)
    blocks, labels = (to_blocks(ids, room), None) if stride is None else windows(ids, room, min(stride, room))
    if not begin:
        return blocks, labels
    labels = (blocks if labels is None else labels).clone()
    labels[:, 0] = IGNORED
    labels[torch.isin(labels, torch.tensor(begin))] = IGNORED  # of documents further on
    if not (labels != IGNORED).any():  # the end of a text may be the same token as its beginning
        raise DataError(
            f"the text has {len(ids)} tokens, and none of them can be predicted from tokens of its own before it; "
            "perplexity needs at least 2 such tokens, so give a longer text"
        )
    return with_begin(blocks, begin), F.pad(labels, (len(begin), 0), value=IGNORED)


@torch.no_grad()
def evaluate_blocks(
    model: nn.Module, blocks: Tensor, batch_size: int = 8, progress: bool = False, labels: Tensor | None = None
) -> Evaluation:
    """Loss of ``model`` on ``blocks (n, block_size)``.

    Args:
        labels: ``(n, block_size)``, from :func:`windows`; without, every token but a block's first is predicted.
    """
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    start = time.perf_counter()
    with evaluating(model):
        for batch, wanted in _batches(blocks, labels, batch_size, device, "evaluate" if progress else None):
            wanted = wanted.to(device)
            total += summed_loss(model(input_ids=batch.to(device), **without_cache(model)).logits, wanted).item()
            tokens += predicted_tokens(wanted)
    seconds = time.perf_counter() - start
    return Evaluation(total / tokens, tokens, tokens / seconds)


@torch.no_grad()
def agreement(
    model: nn.Module,
    baseline: nn.Module,
    blocks: Tensor,
    batch_size: int = 8,
    progress: bool = False,
    labels: Tensor | None = None,
) -> Agreement:
    """How closely ``model`` follows ``baseline`` on ``blocks (n, block_size)``; logits are kept for one batch only.

    Args:
        labels: ``(n, block_size)``, from :func:`windows`; their values do not matter, only which ones are ``IGNORED``.

    Raises:
        ConfigError: the vocabularies differ in size, so there is nothing to compare.
    """
    device, other = next(model.parameters()).device, next(baseline.parameters()).device
    kl, same, tokens = 0.0, 0, 0
    with evaluating(model), evaluating(baseline):
        for batch, wanted in _batches(blocks, labels, batch_size, device, "agreement" if progress else None):
            logits = model(input_ids=batch.to(device), **without_cache(model)).logits
            reference = baseline(input_ids=batch.to(other), **without_cache(baseline)).logits.to(device)
            if logits.shape[-1] != reference.shape[-1]:
                raise ConfigError(
                    f"the model predicts {logits.shape[-1]} different tokens and the baseline {reference.shape[-1]}; "
                    "agreement needs the same vocabulary"
                )
            counted = (wanted[:, 1:] != IGNORED).to(device)
            logits, reference = logits[:, :-1], reference[:, :-1]
            same += int((logits.argmax(-1) == reference.argmax(-1))[counted].sum())
            kl += divergence(logits, reference, counted).item()
            tokens += int(counted.sum())
    return Agreement(kl / tokens, same / tokens, tokens)


def _require_two(ids: Tensor) -> None:
    if len(ids) < 2:
        raise DataError(f"the text has {len(ids)} tokens; perplexity needs at least 2")


def _batches(
    blocks: Tensor, labels: Tensor | None, batch_size: int, device: torch.device, title: str | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels, ``(batch, block_size)`` each; a progress bar if there is a title."""
    labels = blocks if labels is None else labels
    if device.type == "cpu":
        batch_size = min(batch_size, max(1, _CPU_TOKENS // blocks.shape[1]))
    pairs = list(zip(blocks.split(batch_size), labels.split(batch_size), strict=True))
    yield from progress_bar(pairs, desc=title, unit="batch", progress=bool(title))
