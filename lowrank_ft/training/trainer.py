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
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lowrank_ft.conversion.unpivot import unpivot
from lowrank_ft.data.examples import StepBatches, TokenizedData, collate
from lowrank_ft.errors import ConfigError, DivergedError, TrainingStateError
from lowrank_ft.evaluation.perplexity import Evaluation, predicted_tokens, summed_loss
from lowrank_ft.nn import end_guidance, guide_label, guided_layers, set_alpha, set_gates
from lowrank_ft.nn.modes import without_cache
from lowrank_ft.schedule import alpha_at, lr_factor_at
from lowrank_ft.training import fsdp, resume
from lowrank_ft.training.distillation import Term, make_teacher, summed_kl, terms_of_loss
from lowrank_ft.training.evaluating import evaluate_compact
from lowrank_ft.training.length import run_length
from lowrank_ft.training.metrics import MetricsLog, Window, plot_run
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
from lowrank_ft.training.resume import TrainerState
from lowrank_ft.training.trainable import merge_adapters, restrict_training

StepCallback = Callable[[int, "Trainer"], None]


class Trainer:
    """Fine-tunes a causal language model with or without guides. It works on any module that returns ``.logits``.

    Args:
        model: the model; its guided layers, if any, are phased out. Parameters without gradient stay as they are. Pivoted
            factors become plain ones, in place.
        args: options of the run.
        train_data: what :func:`load_data` returned first.
        eval_data: and second; None for no evaluation.
        accelerator: made by :func:`make_accelerator` if not given.
        on_step_end: called with the number of completed steps, after evaluation and checkpoint.
        teacher: the dense model, for ``distill_weight`` above 0; frozen and moved to the device, in place.
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
            warnings.warn(f"{count} pivoted layers are plain factors now, which learn better", stacklevel=2)
        self.args = args
        self.accelerator = accelerator or make_accelerator(args)
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
        self.best_loss: float | None = None
        self.best_step: int | None = None
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
            self._check_same_run(checkpoint, state)
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
        if checkpoint is None and self.accelerator.is_main_process:
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
        log = MetricsLog(self.output_dir, self.step) if self.accelerator.is_main_process else None
        self._init_trackers()
        self._loop(log)
        if self.eval_data is not None and self.args.load_best_model_at_end:
            self._load_best()
        if log is not None:
            plot_run(log.path, self.output_dir / "training.png")
        return self._finish()

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

    # One step

    def _loop(self, log: MetricsLog | None) -> None:
        args, window = self.args, Window()
        streams: list[Iterator[Any]] = [iter(self._loader(term.data)) for term in self._terms]
        bar = tqdm(
            total=self.max_steps, initial=self.step, desc="fine-tune", unit="step",
            disable=None if self.accelerator.is_main_process else True,
        )  # fmt: skip
        if log is not None and self.step == 0:
            world = {
                "num_processes": self.accelerator.num_processes,
                "parallelism": fsdp.parallelism(self.accelerator),
                "max_steps": self.max_steps,
            }
            if args.fixed_flops:
                world["repeated_steps"] = self._length.repeated
            log.write(step=0, event="start", guided_steps=self.guided_steps, global_batch=self.global_batch, **world)
        if self.step == 0 and args.eval_steps:
            self._evaluate_and_keep_best(log)  # where training starts from
        self._bare.train()
        while self.step < self.max_steps:
            alpha = alpha_at(self.step, self.guided_steps, args.alpha_schedule)
            lr = args.learning_rate * self._lr_factor()
            began = time.perf_counter()
            losses, norm, tokens = self._optimizer_step(streams, alpha, lr)
            window.add(losses, tokens, time.perf_counter() - began)
            self.step += 1
            if log is not None and (self.step % max(1, args.logging_steps) == 0 or self.step == self.max_steps):
                speed = window.tokens / window.seconds
                means = window.means()
                entry = {**means, "alpha": alpha, "learning_rate": lr, "grad_norm": norm}
                log.write(step=self.step, **entry, tokens_per_second=round(speed, 1))
                self.accelerator.log(entry, step=self.step)
                bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, alpha=f"{alpha:.2f}")
                window = Window()
            if self.step == self.guided_steps:
                freed = self._end_guidance()
                if log is not None:
                    log.write(step=self.step, event="end_guidance", freed_bytes=freed)
            if self._due(args.eval_steps) or self.step == self.max_steps:
                self._evaluate_and_keep_best(log)
            if self._due(args.save_steps):
                self._save()
            bar.update()
            if self.on_step_end is not None:
                self.on_step_end(self.step, self)
        bar.close()

    def _optimizer_step(
        self, streams: list[Iterator[Any]], alpha: float, lr: float
    ) -> tuple[dict[str, float], float, int]:
        """Mean losses over the global batch, the gradient's norm, and how many tokens of the training data counted."""
        accelerator, accumulation = self.accelerator, self.args.gradient_accumulation_steps
        set_alpha(self._bare, alpha)
        if self.args.guide_mode == "stochastic":
            set_gates(self._bare, self.step, alpha, self.args.seed)
        batches = [list(islice(stream, accumulation)) for stream in streams]
        counts = self._sums(*(float(sum(predicted_tokens(b["labels"]) for b in of_term)) for of_term in batches))
        passes = [
            (term, batch, tokens)
            for term, of_term, tokens in zip(self._terms, batches, counts, strict=True)
            for batch in of_term
        ]
        totals = torch.zeros(2, device=accelerator.device)
        for i, (term, batch, tokens) in enumerate(passes):
            with nullcontext() if i == len(passes) - 1 else accelerator.no_sync(self.model):
                loss, parts = self._losses(term, send_to_device(batch, accelerator.device), tokens)
                # Gradients are averaged over processes, and the loss is a sum over all of them.
                accelerator.backward(loss * accelerator.num_processes)
            totals += parts
        parameters = [p for p in self._bare.parameters() if p.requires_grad]
        limit = self.args.max_grad_norm or math.inf
        norm = fsdp.whole(accelerator.clip_grad_norm_(parameters, limit))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        losses = dict(zip(("loss", "distill_loss"), self._sums(*totals.tolist()), strict=True))
        if self._teacher is None:
            del losses["distill_loss"]
        for name, value in losses.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"the {name} is {value} at step {self.step}; lower --learning-rate, or train in bf16 rather than fp16"
                )
        return losses, float(norm), int(counts[0])

    def _losses(self, term: Term, batch: dict[str, Any], tokens: float) -> tuple[Tensor, Tensor]:
        """This batch's part in the loss of the step; and in the mean cross-entropy and the mean KL, ``(2,)``."""
        labels = batch.pop("labels")
        # The teacher goes first: its activations are gone before those of the model, which stay for the gradient.
        wanted = self._teacher.logits(batch) if self._teacher is not None and term.kl is not None else None
        logits = self.model(**batch, **self._forward_options).logits
        loss, cross_entropy, kl = (torch.zeros((), device=logits.device) for _ in range(3))
        if term.cross_entropy is not None:
            cross_entropy = summed_loss(logits, labels) / tokens
            loss = loss + term.cross_entropy * cross_entropy
        if term.kl is not None and wanted is not None:
            kl = summed_kl(logits, wanted, labels, self.args.distill_temperature) / tokens
            loss = loss + term.kl * kl
        return loss, torch.stack([cross_entropy.detach(), kl.detach()])

    def _lr_factor(self) -> float:
        warmup = round(self.args.warmup_ratio * self.max_steps)
        return lr_factor_at(self.step, self.max_steps, warmup, self.args.lr_scheduler_type)

    def _loader(self, data: TokenizedData) -> DataLoader:
        accelerator, args = self.accelerator, self.args
        sampler = StepBatches(
            len(data), args.per_device_train_batch_size, args.gradient_accumulation_steps, args.seed,
            accelerator.process_index, accelerator.num_processes, first_step=self.step,
            data_step=self._length.data_step,
        )  # fmt: skip
        # A generator of its own: making an iterator draws a number, which must not come out of the training's stream.
        generator = torch.Generator().manual_seed(args.seed)
        return DataLoader(data, batch_sampler=sampler, collate_fn=collate, generator=generator)

    def _end_guidance(self) -> int:
        units = fsdp.guide_units(self._bare) if self._sharded else []
        freed = end_guidance(self._bare, getattr(self.optimizer, "optimizer", self.optimizer))
        if self.args.guide_mode == "stochastic":
            compile_model(self._bare, self.args)
        if self._sharded:
            fsdp.forget_units(self._bare, units)
        elif freed and self.accelerator.distributed_type != DistributedType.NO:
            # DDP holds every parameter that it was made with, and waits for the gradients of those that had one.
            self._bare = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            del self.model
            self.accelerator._models.clear()  # accelerate keeps a reference, and has no way to drop one model
            gc.collect()
            self.accelerator.ddp_handler = ddp_handler(self._ddp_handler, self._bare, self.args)
            self.model = self.accelerator.prepare_model(self._bare)
        del units
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return freed

    # Evaluation, checkpoints

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _evaluate_and_keep_best(self, log: MetricsLog | None) -> None:
        if self.eval_data is None:
            return
        result = self.evaluate()
        if log is not None:
            entry = {"eval_loss": result.loss, "eval_perplexity": result.perplexity}
            log.write(step=self.step, **entry)
            self.accelerator.log(entry, step=self.step)
        if self.best_loss is None or result.loss < self.best_loss:
            self.best_loss, self.best_step = result.loss, self.step
            if self.args.load_best_model_at_end and self.step < self.max_steps:
                resume.write_best(self.output_dir, self._bare, self.accelerator, self._sharded)

    def _load_best(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.best_step is None or self.best_step == self.max_steps:
            return
        if not resume.read_best(self.output_dir, self._bare):
            folder = self.output_dir / resume.FOLDER
            warnings.warn(f"{folder}/best is missing; the weights of the last step are kept instead", stacklevel=2)
            self.best_loss = self.best_step = None
        elif self.best_step == 0 and self.accelerator.is_main_process:
            warnings.warn(
                f"no step of this training was better on the held-out data than the start (loss {self.best_loss:.4f}), so the "
                "result is the model AS IT WAS BEFORE TRAINING; lower learning_rate, give more or other data, or keep the "
                "last weights with --no_load_best_model_at_end",
                stacklevel=3,
            )

    def _save(self) -> None:
        accelerator = self.accelerator
        final = resume.checkpoint_path(self.output_dir, self.step)
        draft = final.with_name(f".{final.name}.partial")
        if accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)  # what a killed run left
        accelerator.wait_for_everyone()
        draft.mkdir(parents=True, exist_ok=True)
        resume.write_rng(draft, accelerator.process_index)
        if self._sharded or accelerator.is_main_process:
            bare_optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            resume.write_tensors(draft, self._bare, bare_optimizer, self._sharded)
        if accelerator.is_main_process:
            state = TrainerState(
                self.step, any(guided_layers(self._bare)), self.best_loss, self.best_step, self._must_match(),
                accelerator.scaler.state_dict() if accelerator.scaler is not None else {},
            )  # fmt: skip
            resume.write_description(draft, self._bare, self._architecture, state)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            resume.commit(draft, final, self.args.save_total_limit)
        accelerator.wait_for_everyone()

    def _must_match(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it resumes, to be the same run."""
        names = (
            "learning_rate", "lr_scheduler_type", "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2",
            "max_grad_norm", "alpha_schedule", "seed", "distill_weight", "distill_temperature", "guide_mode",
            "fixed_flops", "optim", "trainable", "lora_r", "lora_alpha", "decay_vectors",
        )  # fmt: skip
        return {
            "max_steps": self.max_steps,
            "guided_steps": self.guided_steps,
            "global_batch": self.global_batch,
            "train_examples": len(self.train_data),
            "train_data": self.train_data.fingerprint(),
            "eval_data": None if self.eval_data is None else self.eval_data.fingerprint(),
            "distill_data": None if self.distill_data is None else self.distill_data.fingerprint(),
            "teacher": None if self._teacher is None else self._teacher.fingerprint(),
            "guides": self._guide_kinds,
            "mixed_precision": str(self.accelerator.mixed_precision),
            "dtype": self._dtype,
            **{name: getattr(self.args, name) for name in names},
            **self._facts,
        }

    def _check_same_run(self, checkpoint: Path, state: TrainerState) -> None:
        now, then = self._must_match(), state.must_match
        # What only this run has counts, too: another rank is a name that the other run did not have.
        # But not a value that a newer transformers has put into the config.
        names = [*then, *(name for name in now if name not in then and not name.startswith("config."))]
        changed = [f"{k} {then.get(k)!r} -> {now.get(k)!r}" for k in names if now.get(k) != then.get(k)]
        if changed:
            problem = f"{checkpoint} is of a run with other settings: {'; '.join(changed)}"
            if not self.args.resume_with_changes:
                raise TrainingStateError(f"{problem}; go on with the old ones, or with --resume_with_changes")
            warnings.warn(problem, stacklevel=3)
        if state.guided and not any(guided_layers(self._bare)):
            raise TrainingStateError(
                f"{checkpoint} is of the guided phase, and this model has no guide; start with the same --guide"
            )

    def _restore(self, checkpoint: Path, state: TrainerState) -> None:
        resume.read_tensors(checkpoint, self._bare, getattr(self.optimizer, "optimizer", self.optimizer))
        if self.accelerator.scaler is not None and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        resume.read_rng(checkpoint, self.accelerator.process_index)
        self.step, self.best_loss, self.best_step = state.step, state.best_loss, state.best_step

    def _init_trackers(self) -> None:
        if self.args.report_to:
            flat = {k: v for k, v in vars(self.args).items() if isinstance(v, int | float | str | bool)}
            self.accelerator.init_trackers(self.args.run_name, config=flat)

    def _sums(self, *values: float) -> list[float]:
        """Each summed over all processes."""
        tensor = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        return self.accelerator.reduce(tensor, "sum").tolist()
