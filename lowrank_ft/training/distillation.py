"""Distillation: the fine-tuned model also follows the dense model's next-token distribution.

    loss = (1 - w) * CE + w * T^2 * KL(p || q),   p = softmax(teacher / T),   q = softmax(student / T)

Hinton et al. 2015, arXiv 1503.02531. ``T`` flattens both distributions; ``T^2`` undoes what that takes from the size
of the gradient. CE is a mean over the predicted tokens of the training data. KL is a mean over those of the
distillation data where there are any, and of the training data otherwise.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_ft.data.examples import IGNORED, TokenizedData
from lowrank_ft.errors import ConfigError
from lowrank_ft.evaluation.divergence import divergence
from lowrank_ft.nn.modes import without_cache
from lowrank_ft.training import fsdp
from lowrank_ft.training.options import TrainArguments


def summed_kl(logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(softmax(teacher_logits / T) || softmax(logits / T))`` in nats, summed over the predicted positions.

    Args:
        logits, teacher_logits, temperature: see :func:`lowrank_ft.evaluation.divergence.divergence`.
        labels: ``(batch, length)``, not shifted; ``IGNORED`` where a token does not count. Their values do not matter.

    Returns:
        A scalar, not multiplied by ``T^2``.

    Raises:
        ConfigError: the vocabularies differ in size.
    """
    _require_same_vocabulary(logits.shape[-1], teacher_logits.shape[-1])
    return divergence(logits, teacher_logits, F.pad(labels[:, 1:] != IGNORED, (0, 1)), temperature)


@dataclass(frozen=True)
class Term:
    """One kind of data in the loss of a step.

    Attributes:
        data: of which each step takes a batch.
        cross_entropy: factor on the mean cross-entropy; None where it is not computed.
        kl: likewise on the mean KL.
    """

    data: TokenizedData
    cross_entropy: float | None
    kl: float | None


def terms_of_loss(args: TrainArguments, train_data: TokenizedData, distill_data: TokenizedData | None) -> list[Term]:
    """What a step minimizes: the sum of these."""
    weight, kl = args.distill_weight, args.distill_weight * args.distill_temperature**2
    if weight == 0:
        return [Term(train_data, 1.0, None)]
    if distill_data is None:
        return [Term(train_data, 1 - weight, kl)]
    return [Term(train_data, 1 - weight, None), Term(distill_data, None, kl)]


class Teacher:
    """The dense model as a fixed function of a batch. It stays out of DDP, the optimizer and every checkpoint.

    Under FSDP2 it is sharded as the student is, and all processes have to ask for logits together.

    Args:
        model: put into evaluation mode, frozen, and moved to the device or sharded over the devices, in place.
        student: what learns from it.

    Raises:
        ConfigError: the vocabularies differ in size, or the two share parameters.
    """

    def __init__(self, model: nn.Module, student: nn.Module, accelerator: Accelerator) -> None:
        sizes = [vocabulary(m) for m in (student, model)]
        if None not in sizes:
            _require_same_vocabulary(*sizes)
        if not {id(p) for p in model.parameters()}.isdisjoint(id(p) for p in student.parameters()):
            raise ConfigError("the teacher shares parameters with the model that is trained; give a copy of it")
        # Autocast keeps a converted copy of every weight that could get a gradient; a frozen one is not kept.
        self.model = model.eval().requires_grad_(False)
        few = torch.cat([p.flatten()[:16].float().cpu() for p in model.parameters()])
        self.fingerprint = f"crc32 {zlib.crc32(few.numpy().tobytes()):08x}"
        """Changes with the weights, of which it reads a few each; tells a resumed run that its teacher is another."""
        self._sharded = fsdp.uses_fsdp(accelerator)
        if self._sharded:
            fsdp.shard_frozen(model, accelerator)
        else:
            model.to(accelerator.device)
        self._autocast = accelerator.autocast
        self._options = without_cache(model)

    @torch.no_grad()
    def logits(self, batch: dict[str, Any]) -> Tensor:
        """``(batch, length, vocabulary)``, computed in the precision that the student is trained in."""
        with self._autocast():
            logits: Tensor = self.model(**batch, **self._options).logits
        if self._sharded:
            # Older versions of torch keep the root gathered, for a backward pass that does not come.
            fsdp.reshard(self.model)
        return logits


def make_teacher(
    model: nn.Module | None,
    student: nn.Module,
    args: TrainArguments,
    distill_data: TokenizedData | None,
    accelerator: Accelerator,
) -> Teacher | None:
    """The teacher of a run, or None where ``distill_weight`` is 0.

    Raises:
        ConfigError: see :class:`Teacher`; or what was given does not agree with ``distill_weight``.
    """
    if args.distill_weight == 0:
        given = "a teacher" if model is not None else "distill_data" if distill_data is not None else None
        if given:
            raise ConfigError(
                f"{given} is given, and distill_weight 0 would not use it; set distill_weight above 0 and at most 1, "
                "or leave it out"
            )
        return None
    if model is None:
        raise ConfigError(
            f"distill_weight is {args.distill_weight} and there is no teacher; give the Trainer the dense model as "
            "teacher, or set distill_weight 0"
        )
    return Teacher(model, student, accelerator)


def vocabulary(model: nn.Module) -> int | None:
    """How many tokens a model of transformers predicts; None where its config does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None)


def _require_same_vocabulary(student: Any, teacher: Any) -> None:
    if student != teacher:
        raise ConfigError(
            f"the model predicts {student} different tokens and the teacher {teacher}; distillation needs the same "
            "vocabulary, so name the dense model that this one was made from (--guide-model)"
        )
