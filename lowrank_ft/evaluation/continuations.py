"""How likely continuations of a context are, with the context read once.

    log p(c | context) = sum_i log p(c_i | context, c_1 .. c_{i-1})

The choices of a question share their context, which is most of the tokens: the model reads it once and keeps its keys
and values, and each choice goes on from there. This needs a cache that can be taken for several continuations, which
models with a recurrent state do not have.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
"""Caches that hold keys and values of tokens and nothing else; their subclasses may hold more."""


@torch.no_grad()
def continuation_scores(
    model: Any, contexts: Tensor, continuations: Sequence[Sequence[Sequence[int]]]
) -> list[list[tuple[float, bool]]]:
    """Score the continuations of several contexts of one length.

    Args:
        model: a causal language model for which :func:`shares_contexts` is true.
        contexts: token ids ``(items, length)``, none of them padding.
        continuations: for each item its continuations, each of one token id or more.

    Returns:
        For each continuation of each item, its log-likelihood in nats, from a float32 softmax, and whether each of its
        tokens is the one that the model ranks first.
    """
    start = model(input_ids=contexts, use_cache=True, **_last_logits(model))
    rows = [list(c) for each in continuations for c in each]
    owners = [i for i, each in enumerate(continuations) for _ in each]
    width = max(len(row) for row in rows)
    # (rows, 1, vocabulary): what comes after the context predicts the first token of each continuation
    logits = start.logits[:, -1:][owners]
    if width > 1:
        start.past_key_values.batch_select_indices(torch.tensor(owners, device=contexts.device))
        # Padding on the right: nothing that counts comes after it, so no mask is needed.
        inputs = torch.tensor([row[:-1] + [0] * (width - len(row)) for row in rows], device=contexts.device)
        more = model(input_ids=inputs, past_key_values=start.past_key_values, use_cache=True)
        logits = torch.cat([logits, more.logits], dim=1)
    found = []
    for row, each in zip(rows, logits, strict=True):
        logs = each[: len(row)].float().log_softmax(-1)
        targets = torch.tensor(row, device=logs.device)
        likelihood = float(logs.gather(1, targets[:, None]).sum())
        found.append((likelihood, bool((logs.argmax(-1) == targets).all())))
    scores = iter(found)
    return [[next(scores) for _ in each] for each in continuations]


@torch.no_grad()
def shares_contexts(model: Any) -> bool:
    """Whether the model can go on from one context several times; found out by doing it with a few tokens.

    A model whose cache is not of keys and values alone, or that computes something else with a cache than without one,
    cannot; nor can one that fails with a cache.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    try:
        start = model(input_ids=ids[:, :5], use_cache=True)
        cache = start.past_key_values
        if not isinstance(cache, DynamicCache) or any(type(layer) not in _ATTENTION for layer in cache.layers):
            return False
        cache.batch_select_indices(torch.tensor([0, 0], device=device))
        parts = model(input_ids=ids[:, 5:].repeat(2, 1), past_key_values=cache, use_cache=True).logits.float()
        whole = model(input_ids=ids).logits[:, 5:].float()
    except Exception:  # of any kind, from the code of any model; without a cache it may do
        return False
    # 16-bit products are rounded; what a wrong position or a missing token does is larger.
    return bool((parts - whole).abs().mean() <= 0.05 * whole.std())


def _last_logits(model: Any) -> dict[str, int]:
    """Most models can leave out the logits that nobody reads."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
