"""The training loop on Accelerate that phases the dense weight out.

    for step in range(max_steps):
        alpha = alpha_at(step)                    # 1 at step 0, 0 from guided_steps on
        loss  = sum over the global batch of the cross-entropies / number of counted tokens in it
        loss  = (1 - w) * loss + w * T^2 * KL     # with distillation, see distillation.py
        ...
        after step guided_steps - 1: end_guidance # from here on this is the compact model

Everything that varies over time (alpha, learning rate, order of the data) is a pure function of the step, and the loss
is normalized by the tokens of the whole global batch, so the way in which a batch is spread over accumulation and
processes does not change the result, and a resumed run is the same run. One process, DDP and FSDP2 share this loop;
what FSDP2 needs beyond it is in :mod:`lowrank_ft.training.fsdp`.
"""

import gc
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lowrank_ft.conversion.unpivot import unpivot
from lowrank_ft.data.examples import TokenizedData
from lowrank_ft.errors import ConfigError
from lowrank_ft.evaluation.perplexity import Evaluation
from lowrank_ft.nn import end_guidance, guide_label, guided_layers
from lowrank_ft.nn.modes import without_cache
from lowrank_ft.schedule import lr_factor_at
from lowrank_ft.training import fsdp, resume
from lowrank_ft.training.best import Best
from lowrank_ft.training.distillation import make_teacher, terms_of_loss
from lowrank_ft.training.guidance import drop_guides, evaluate_compact, guide_step, remake_ddp, require_guides
from lowrank_ft.training.length import run_length
from lowrank_ft.training.options import TrainArguments
from lowrank_ft.training.preparation import (
    check_compiler,
    checkpoint_to_resume,
    compile_model,
    ddp_handler,
    make_accelerator,
    make_optimizer,
    uncompile,
)
from lowrank_ft.training.progress import Progress
from lowrank_ft.training.resume import TrainerState
from lowrank_ft.training.same_run import check_same_run, data_to_match, options_to_match
from lowrank_ft.training.step import OptimizerStep
from lowrank_ft.training.trainable import ADAPTED, merge_adapters, restrict_training

StepCallback = Callable[[int, "Trainer"], None]


class Trainer:
    """Fine-tunes a causal language model with or without guides. It works on any module that returns ``.logits``.

    Args:
        model: the model; its guided layers, if any, are phased out. Parameters without gradient stay as they are. Pivoted
            factors become plain ones, in place.
        args: options of the run.
        train_data: what :func:`load_data` returned first.
        eval_data: and second; None for no evaluation.
        accelerator: made by :func:`make_accelerator` if not given. Its own gradient accumulation is set to 1: that of
            ``args`` counts.
        on_step_end: called with the number of completed steps, after evaluation and checkpoint.
        teacher: the dense model, for ``distill_weight`` above 0; frozen, moved to the device or sharded, in place.
        distill_data: text on which the model is held to the teacher; None for the training data.
        facts: further settings, JSON values by name, that a resumed run must share with the run that it resumes.

    Raises:
        ConfigError: a form of parallelism that is not supported, nothing to train, or options or a teacher that do not
            fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainArguments,
        train_data: TokenizedData,
        eval_data: TokenizedData | None = None,
        accelerator: Accelerator | None = None,
        on_step_end: StepCallback | None = None,
        teacher: nn.Module | None = None,
        distill_data: TokenizedData | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if count := unpivot(model):
            warnings.warn(f"{count} pivoted layers were made plain factors, which learn better", stacklevel=2)
        self.args = args
        self.accelerator = accelerator or make_accelerator(args)
        # The loss is divided by the tokens of all passes already; the launcher's setting, or the caller's, would divide it
        # once more.
        self.accelerator.gradient_accumulation_steps = 1
        fsdp.set_up(self.accelerator)
        self._sharded = fsdp.uses_fsdp(self.accelerator)
        self.train_data, self.eval_data, self.distill_data = train_data, eval_data, distill_data
        self.on_step_end = on_step_end
        self._facts = dict(facts or {})
        self._teacher = make_teacher(teacher, model, args, distill_data, self.accelerator)
        self._terms = terms_of_loss(args, train_data, distill_data)
        self.output_dir = Path(args.output_dir)
        world, accumulation = self.accelerator.num_processes, args.gradient_accumulation_steps
        self.global_batch = args.per_device_train_batch_size * accumulation * world
        epochs = math.ceil(len(train_data) * args.num_train_epochs / self.global_batch)
        mean_length = (train_data.starts[-1] - train_data.starts[0]) / len(train_data)
        self._length = run_length(model, args, args.max_steps if args.max_steps > 0 else epochs, mean_length)
        self.max_steps, self.guided_steps = self._length.total, self._length.guided
        self.step = 0
        self._best = Best(self.output_dir, args.load_best_model_at_end, self.max_steps)
        self._start: tuple[Path | None, TrainerState | None] | None = None
        self._bare: Any = model
        self._architecture = type(model).__name__
        first = next(model.parameters(), torch.empty(0))
        self._dtype = str(first.dtype)  # now, as FSDP2 makes them float32 under mixed precision
        self._blocks = fsdp.block_classes(model, self.accelerator) if self._sharded else set()
        self._forward_options = without_cache(model)
        self._ddp_handler = self.accelerator.ddp_handler
        check_compiler(args, self.accelerator.device, self._sharded)
        self._guide_kinds = sorted({guide_label(layer) for _, layer in guided_layers(model)})
        restrict_training(model, args.trainable, args.lora_r, args.lora_alpha, args.seed)
        if args.gradient_checkpointing:
            if not hasattr(model, "gradient_checkpointing_enable"):
                raise ConfigError(f"{type(model).__name__} does not support gradient checkpointing")
            bare: Any = model
            bare.gradient_checkpointing_enable({"use_reentrant": False})

    def starting_point(self) -> tuple[Path | None, TrainerState | None]:
        """The checkpoint from which :meth:`train` will go on, and what it says; None for a fresh start. Changes nothing.

        Raises:
            TrainingStateError: the checkpoint does not exist, or does not fit this run.
            OutputError: ``output_dir`` cannot be used, see :func:`checkpoint_to_resume`.
        """
        checkpoint = checkpoint_to_resume(self.args)
        state = resume.read_state(checkpoint) if checkpoint else None
        if checkpoint is not None and state is not None:
            check_same_run(checkpoint, state.must_match, self._must_match(), self.args.resume_with_changes)
            if state.guided:
                require_guides(self._bare, checkpoint, "start with the same --guide")
        self._start = checkpoint, state
        return self._start

    def train(self) -> nn.Module:
        """Run to the end; returns the bare model without guides, with the best weights if asked for.

        Under FSDP2 that is another object than the sharded model that was trained, and on the CPU. The main process
        gets all of it; the parameters on the others are on the meta device.

        Raises:
            TrainingStateError, OutputError: see :meth:`starting_point`.
        """
        (checkpoint, state), self._start = self._start or self.starting_point(), None
        if self.accelerator.is_main_process and not resume.is_of_run(checkpoint, self.output_dir):
            resume.remove_all(self.output_dir)  # those of a run that is being replaced would be taken for this one's
        self.accelerator.wait_for_everyone()
        # The model must have the checkpoint's shape before the optimizer is made and before weights are loaded.
        if self.guided_steps == 0 or (state is not None and not state.guided):
            end_guidance(self._bare)
        optimizer = make_optimizer(self._bare, self.args)
        if self._sharded:
            fsdp.require_shared_folder(self.output_dir, self.accelerator)
            fsdp.require_same_model(self._bare, self.accelerator)
            fsdp.choose_units(self._bare, self.accelerator, self._blocks)
            self._skeleton = fsdp.skeleton(self._bare)
        compile_model(self._bare, self.args)
        self.accelerator.ddp_handler = ddp_handler(self._ddp_handler, self._bare, self.args)
        self.model, self.optimizer = self.accelerator.prepare(self._bare, optimizer)
        torch.manual_seed(self.args.seed + self.accelerator.process_index)  # dropout differs from process to process
        if checkpoint is not None and state is not None:
            self._restore(checkpoint, state)
            if self.step >= self.guided_steps and any(guided_layers(self._bare)):
                self._end_guidance()  # resumed with changes, to a shorter guided phase
        progress = Progress(self.accelerator, self.args, self.output_dir, self.step, self.max_steps)
        self._loop(progress)
        if self.eval_data is not None and self.args.load_best_model_at_end:
            self._best.load(self._bare, self.accelerator)
        progress.draw(self.output_dir / "training.png")
        return self._finish()

    @property
    def best_loss(self) -> float | None:
        """The lowest loss on the held-out data."""
        return self._best.loss

    @property
    def best_step(self) -> int | None:
        """The number of completed steps at which it was reached; 0 is the start."""
        return self._best.step

    def evaluate(self) -> Evaluation:
        """Loss of the compact model, the one that would be exported, on the held-out data, over all processes."""
        assert self.eval_data is not None
        return evaluate_compact(self._bare, self.eval_data, self.args.per_device_eval_batch_size, self.accelerator)

    def _finish(self) -> nn.Module:
        # Mixed precision wraps forward; what is handed back is the plain model.
        self._bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        uncompile(self._bare)
        if self._sharded:
            end_guidance(self._skeleton)
            self._bare = fsdp.gather_into(self._skeleton, self._bare, keep=self.accelerator.is_main_process)
        if self.args.gradient_checkpointing:
            self._bare.gradient_checkpointing_disable()
        if self.args.trainable in ADAPTED:  # those that came with the model stay the caller's
            merge_adapters(self._bare)
        self._bare.eval()
        # DDP's reducer must be gone, on all processes, before the process group is.
        self.accelerator.wait_for_everyone()
        del self.model, self.optimizer
        self._teacher = None
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()
        return self._bare

    # The loop

    def _loop(self, progress: Progress) -> None:
        args = self.args
        step = OptimizerStep(
            self.accelerator, args, self._terms, self._teacher, self._length, self.step, self._forward_options
        )
        if self.step == 0:
            facts = {"repeated_steps": self._length.repeated} if args.fixed_flops else {}
            progress.event(
                0, "start", guided_steps=self.guided_steps, global_batch=self.global_batch,
                num_processes=self.accelerator.num_processes, parallelism=fsdp.parallelism(self.accelerator),
                max_steps=self.max_steps, **facts,
            )  # fmt: skip
            if args.eval_steps:
                self._evaluate_and_keep_best(progress)  # where training starts from
        self._bare.train()
        while self.step < self.max_steps:
            gates = args.seed if args.guide_mode == "stochastic" else None
            alpha = guide_step(self._bare, self.step, self.guided_steps, args.alpha_schedule, gates)
            lr = args.learning_rate * self._lr_factor()
            began = time.perf_counter()
            losses, norm, tokens = step.take(self.model, self._bare, self.optimizer, self.step, lr)
            seconds = time.perf_counter() - began
            self.step += 1
            progress.trained(self.step, losses, tokens, seconds, alpha=alpha, learning_rate=lr, grad_norm=norm)
            if self.step == self.guided_steps:
                progress.event(self.step, "end_guidance", freed_bytes=self._end_guidance())
            if self._due(args.eval_steps) or self.step == self.max_steps:
                self._evaluate_and_keep_best(progress)
            if self._due(args.save_steps):
                self._save()
            progress.step_done()
            if self.on_step_end is not None:
                self.on_step_end(self.step, self)
        progress.close()

    def _lr_factor(self) -> float:
        warmup = round(self.args.warmup_ratio * self.max_steps)
        return lr_factor_at(self.step, self.max_steps, warmup, self.args.lr_scheduler_type)

    def _end_guidance(self) -> int:
        return drop_guides(self._bare, self.optimizer, self._rewrap)

    def _rewrap(self) -> None:
        """For the model that has just lost its guides: compiled now if gates were in the way, and in a fresh DDP."""
        if self.args.guide_mode == "stochastic":
            compile_model(self._bare, self.args)
        self.accelerator.ddp_handler = ddp_handler(self._ddp_handler, self._bare, self.args)
        remake_ddp(self.accelerator, self.model)

    # Evaluation, checkpoints

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate_and_keep_best(self, progress: Progress) -> None:
        if self.eval_data is None:
            return
        result = self.evaluate()
        progress.evaluated(self.step, result.loss, result.perplexity)
        self._best.see(result.loss, self.step, self._bare, self.accelerator, self._sharded)

    def _save(self) -> None:
        scaler = self.accelerator.scaler
        state = TrainerState(
            self.step, any(guided_layers(self._bare)), self.best_loss, self.best_step, self._must_match(),
            scaler.state_dict() if scaler is not None else {},
        )  # fmt: skip
        resume.save(
            resume.checkpoint_path(self.output_dir, self.step), self._bare, self._architecture, self.optimizer,
            self.accelerator, state, self.args.save_total_limit, self._sharded,
        )  # fmt: skip

    def _must_match(self) -> dict[str, Any]:
        return {
            "max_steps": self.max_steps,
            "guided_steps": self.guided_steps,
            "global_batch": self.global_batch,
            **data_to_match(self.train_data, self.eval_data, self.distill_data),
            "teacher": None if self._teacher is None else self._teacher.fingerprint,
            "guides": self._guide_kinds,
            "mixed_precision": str(self.accelerator.mixed_precision),
            "dtype": self._dtype,
            **options_to_match(self.args),
            **self._facts,
        }

    def _restore(self, checkpoint: Path, state: TrainerState) -> None:
        resume.read_tensors(checkpoint, self._bare, getattr(self.optimizer, "optimizer", self.optimizer))
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        resume.read_rng(checkpoint, self.accelerator.process_index)
        self.step = state.step
        self._best.restore(state.best_loss, state.best_step)
        self.accelerator.wait_for_everyone()  # no process may still refuse the checkpoint
        if self.accelerator.is_main_process:
            later = resume.remove_later(self.output_dir, checkpoint, self.step)
            if later:
                print(f"note: removed {', '.join(later)}: the run goes on from {checkpoint.name}", file=sys.stderr)
