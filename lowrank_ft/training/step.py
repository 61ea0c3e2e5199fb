"""One optimizer step: the batches of its data, their losses over all processes, the gradient, AdamW."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_ft.data.examples import StepBatches, TokenizedData, collate
from lowrank_ft.errors import DivergedError
from lowrank_ft.evaluation.perplexity import predicted_tokens, summed_loss
from lowrank_ft.training import fsdp
from lowrank_ft.training.distillation import Teacher, Term, summed_kl
from lowrank_ft.training.length import RunLength
from lowrank_ft.training.options import TrainArguments


class OptimizerStep:
    """Takes one step after the other, and with each the next batches.

    Args:
        terms: kinds of data in the loss.
        teacher: None without distillation.
        length: of the run, which says what data a step sees.
        first_step: completed steps.
        options: of the model's forward pass.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: TrainArguments,
        terms: list[Term],
        teacher: Teacher | None,
        length: RunLength,
        first_step: int,
        options: dict[str, Any],
    ) -> None:
        self._accelerator, self._args, self._terms, self._teacher = accelerator, args, terms, teacher
        self._length, self._first_step, self._options = length, first_step, options
        self._streams: list[Iterator[Any]] = [iter(self._loader(term.data)) for term in terms]

    def take(
        self, model: nn.Module, bare: nn.Module, optimizer: Any, step: int, lr: float
    ) -> tuple[dict[str, float], float, int]:
        """Mean losses over the global batch, the gradient's norm, and how many tokens of the training data counted.

        Args:
            model: what runs: wrapped by DDP where there are several processes.
            bare: the model itself.
            step: the number of completed steps.
            lr: learning rate.

        Raises:
            DivergedError: a loss is not finite.
        """
        accelerator, accumulation = self._accelerator, self._args.gradient_accumulation_steps
        batches = [list(islice(stream, accumulation)) for stream in self._streams]
        counts = self._sums(*(float(sum(predicted_tokens(b["labels"]) for b in of_term)) for of_term in batches))
        passes = [
            (term, batch, tokens)
            for term, of_term, tokens in zip(self._terms, batches, counts, strict=True)
            for batch in of_term
        ]
        totals = torch.zeros(2, device=accelerator.device)
        for i, (term, batch, tokens) in enumerate(passes):
            with nullcontext() if i == len(passes) - 1 else accelerator.no_sync(model):
                loss, parts = self._losses(model, term, send_to_device(batch, accelerator.device), tokens)
                # Gradients are averaged over processes, and the loss is a sum over all of them.
                accelerator.backward(loss * accelerator.num_processes)
            totals += parts
        limit = self._args.max_grad_norm or math.inf
        norm = fsdp.whole(accelerator.clip_grad_norm_([p for p in bare.parameters() if p.requires_grad], limit))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        losses = dict(zip(("loss", "distill_loss"), self._sums(*totals.tolist()), strict=True))
        if self._teacher is None:
            del losses["distill_loss"]
        for name, value in losses.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name} is {value} at step {step}; lower --learning-rate, or train in bf16 rather than fp16"
                )
        return losses, float(norm), int(counts[0])

    def _losses(self, model: Any, term: Term, batch: dict[str, Any], tokens: float) -> tuple[Tensor, Tensor]:
        """This batch's part in the loss of the step; and in the mean cross-entropy and the mean KL, ``(2,)``."""
        labels = batch.pop("labels")
        # The teacher goes first: its activations are gone before those of the model, which stay for the gradient.
        wanted = self._teacher.logits(batch) if self._teacher is not None and term.kl is not None else None
        logits = model(**batch, **self._options).logits
        loss, cross_entropy, kl = (torch.zeros((), device=logits.device) for _ in range(3))
        if term.cross_entropy is not None:
            cross_entropy = summed_loss(logits, labels) / tokens
            loss = loss + term.cross_entropy * cross_entropy
        if term.kl is not None and wanted is not None:
            kl = summed_kl(logits, wanted, labels, self._args.distill_temperature) / tokens
            loss = loss + term.kl * kl
        return loss, torch.stack([cross_entropy.detach(), kl.detach()])

    def _loader(self, data: TokenizedData) -> DataLoader:
        accelerator, args = self._accelerator, self._args
        sampler = StepBatches(
            len(data), args.per_device_train_batch_size, args.gradient_accumulation_steps, args.seed,
            accelerator.process_index, accelerator.num_processes, first_step=self._first_step,
            data_step=self._length.data_step,
        )  # fmt: skip
        # A generator of its own: making an iterator draws a number, which must not come out of the training's stream.
        generator = torch.Generator().manual_seed(args.seed)
        return DataLoader(data, batch_sampler=sampler, collate_fn=collate, generator=generator)

    def _sums(self, *values: float) -> list[float]:
        """Each summed over all processes."""
        tensor = torch.tensor(values, dtype=torch.float32, device=self._accelerator.device)
        return self._accelerator.reduce(tensor, "sum").tolist()
