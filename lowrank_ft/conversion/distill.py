"""Train all factors together so that the converted model answers as the dense one does.

    minimize over all U, V    mean over tokens of KL(softmax(dense logits) || softmax(converted logits))

(Hinton et al. 2015, arXiv 1503.02531). A model without logits is held to its last hidden states instead, one with a
single logit to that, by the squared error relative to their size. Block refinement stops errors from building up inside
a block; this step lets blocks make up for each other, and it knows which directions of the hidden states the output
cares about.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lowrank_ft.conversion.chains import Batch, answer_of, run, token_mask
from lowrank_ft.conversion.refine import FactorTrainer, squared_error


def distill(
    model: nn.Module,
    dense_model: nn.Module,
    batches: Sequence[Batch],
    epochs: float,
    learning_rate: float,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Train the factors of ``model`` toward ``dense_model``, one batch per step, in place.

    Needs memory for the gradients of the whole model, and 12 bytes per parameter of the factors.

    Raises:
        DivergedError: the loss is no longer a number.
    """
    steps = round(epochs * len(batches))
    if steps == 0:
        return
    trainer = FactorTrainer(model, steps, learning_rate)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    bar = tqdm(range(steps), desc="distill", unit="step", disable=None if progress else True)
    for _ in bar:
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        with torch.no_grad():
            wanted = run(dense_model, batch)
        with torch.enable_grad():
            loss = difference(run(model, batch), wanted, batch)
            trainer.step(loss)
        bar.set_postfix(loss=f"{loss.item():.4f}")
    trainer.finish()


def difference(found: Any, wanted: Any, batch: Batch) -> Tensor:
    """How far the output of a model is from that of another, as a float32 scalar; padding does not count."""
    answer, distribution = answer_of(found)
    mask = token_mask(batch, answer, decoder=True)
    if not distribution:
        return squared_error(answer, answer_of(wanted)[0], mask)
    p, q = F.log_softmax(answer_of(wanted)[0].float(), -1), F.log_softmax(answer.float(), -1)
    divergence = (p.exp() * (p - q)).sum(-1)
    return divergence.mean() if mask is None else divergence[mask != 0].mean()
