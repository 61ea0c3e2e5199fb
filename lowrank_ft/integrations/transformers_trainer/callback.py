"""Guidance in somebody else's trainer: one callback for ``transformers.Trainer`` and what derives from it, as TRL's do.

    on_step_begin    alpha = alpha_at(state.global_step)            the same for every micro-batch of the step
    forward, eval    the guides are skipped: an evaluation measures what will be exported
    on_step_end      after step guided_steps - 1: the guides leave model, optimizer, DDP and FSDP2
    every checkpoint trainer_state.json says which phase it is of

Alpha is a pure function of the global step, so a resumed run sees the same values. A checkpoint that was written after
the drop needs a model without guides *before* its weights and its optimizer state are read. Trainer calls no callback
there: what has to be changed about it is in :mod:`.patches`, and about the model in :mod:`.model_hooks`.
"""

import json
import warnings
import weakref
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lowrank_ft.errors import ConfigError, TrainingStateError, require_choice
from lowrank_ft.integrations.transformers_trainer.model_hooks import hooks_of
from lowrank_ft.integrations.transformers_trainer.patches import (
    calling_trainer,
    prepare_before_training,
    require_units,
)
from lowrank_ft.nn import end_guidance, guided_layers, stored_form
from lowrank_ft.schedule import ALPHA_SCHEDULES
from lowrank_ft.training.guidance import drop_guides, guide_step, remake_ddp, require_guides

STATE_FILE = "trainer_state.json"
GUIDED, COMPACT = "guided", "compact"
_INSTEAD = {
    "DEEPSPEED": "ZeRO cannot let parameters go while it trains. Run the guided phase with DDP (the same command "
    "without the DeepSpeed config), and start a new run under DeepSpeed, without this callback, from the model it saved",
    "XLA": "it works on one process, with DDP and with FSDP2, on GPUs and CPUs",
    "MEGATRON_LM": "it works on one process, with DDP and with FSDP2",
}


class GuidanceCallback(TrainerCallback, ExportableState):
    """Phases the guides of a model out while ``transformers.Trainer`` trains it.

    For both kinds of guided model: ``lowrank_ft.convert(model, ..., guide=...)``, and PEFT's
    ``get_peft_model(model, LowRankConfig(..., guide=...))``. Hand it to the trainer as ``callbacks=[...]``, on one
    process, with DDP or with FSDP2::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[GuidanceCallback(guided_ratio=0.25)])

    The share ``alpha`` of the guide falls from 1 to 0 over the guided phase (Wei et al. 2024, arXiv 2407.09835), and is
    logged beside the loss. A checkpoint of that phase holds the guides, to resume from; whatever is saved later is
    compact, and ``AutoModel`` loads it after ``import lowrank_ft``.

    Args:
        guided_ratio: length of the guided phase as a share of ``state.max_steps``, 0 to 1; 0.25 if neither this nor
            ``guided_steps`` is given.
        alpha_schedule: one of ``ALPHA_SCHEDULES``.
        guided_steps: that length in optimizer steps, instead of a share.

    Attributes:
        recorded: what this run is, as every checkpoint tells it: phase, number of guided steps, schedule.

    Raises:
        ConfigError: an argument out of range, or both lengths. When the Trainer is made: DeepSpeed and others that do
            not go with guides. When training begins, before the first step: settings of FSDP under which guides would
            be lost; the model has no guide; the guided phase is longer than the training.
        TrainingStateError: when training begins, too: the checkpoint is of a run with another guided phase.
    """

    def __init__(
        self, guided_ratio: float | None = None, alpha_schedule: str = "cosine", guided_steps: int | None = None
    ) -> None:
        if guided_ratio is not None and guided_steps is not None:
            raise ConfigError("give guided_ratio or guided_steps, not both: each says how long the guided phase is")
        if guided_ratio is not None and not 0 <= guided_ratio <= 1:
            raise ConfigError(f"guided_ratio is {guided_ratio}; it is a share of the steps and must be 0 to 1")
        if guided_steps is not None and (not isinstance(guided_steps, int) or guided_steps < 0):
            raise ConfigError(f"guided_steps is {guided_steps!r}; it must be a whole number, 0 or more")
        require_choice("alpha schedule", alpha_schedule, ALPHA_SCHEDULES)
        self.guided_ratio, self.guided_steps, self.alpha_schedule = guided_ratio, guided_steps, alpha_schedule
        self.recorded: dict[str, Any] = {"phase": None, "guided_steps": None, "alpha_schedule": alpha_schedule}
        self._alpha = 0.0

    def state(self) -> dict[str, Any]:
        """What Trainer writes into ``trainer_state.json``."""
        names = ("guided_ratio", "alpha_schedule", "guided_steps")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {"recorded": dict(self.recorded)},
        }

    @staticmethod
    def prepare_for_resume(model: nn.Module, checkpoint: str | Path) -> None:
        """Give ``model`` the shape of ``checkpoint``: without guides, if it was written after they were dropped.

        Trainer needs this before it reads the checkpoint. A callback in ``callbacks=[...]`` sees to it by itself. Call
        it, before making the Trainer, if the callback is added later, with ``add_callback``.

        Args:
            model: guided, as it was before the first step of the run.
            checkpoint: a folder ``checkpoint-N`` of that run.

        Raises:
            TrainingStateError: the checkpoint was not written with this callback; or it is of the guided phase, and the
                model has no guide.
        """
        path = Path(checkpoint) / STATE_FILE
        try:
            callbacks = json.loads(path.read_text(encoding="utf-8"))["stateful_callbacks"]
        except (OSError, ValueError, KeyError) as error:
            raise TrainingStateError(
                f"{path} cannot be read ({error}); name a checkpoint that Trainer wrote"
            ) from error
        record = _record_in(callbacks)
        if record is None or record["phase"] is None:
            raise TrainingStateError(
                f"{checkpoint} was written without a GuidanceCallback; it has no phase to prepare for"
            )
        if record["phase"] == COMPACT:
            end_guidance(model)
        else:
            require_guides(model, checkpoint, _MAKE_GUIDES)

    # Events of the Trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _refuse_setups(args)
        if (trainer := calling_trainer()) is not None:
            prepare_before_training(trainer, self.prepare_for_resume, self._begins_guided)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_setups(args)
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        hooks = hooks_of(model)
        if hooks.trainer() is None and (trainer := calling_trainer()) is not None:  # it came with add_callback
            hooks.trainer = weakref.ref(trainer)
        phase = self._check_phase(state, model)
        require_units(model)
        steps = self._resolve_steps(state.max_steps) if phase == GUIDED else self.recorded["guided_steps"]
        self.recorded = {"phase": phase, "guided_steps": steps, "alpha_schedule": self.alpha_schedule}
        if phase == COMPACT or state.global_step >= steps:
            self._drop(model, optimizer)
        else:
            hooks.skip_guides_in_evaluation()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._alpha = guide_step(kwargs["model"], state.global_step, self.recorded["guided_steps"], self.alpha_schedule)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Before Trainer saves the checkpoint of this step, so that its weights and its phase agree.
        if self.recorded["phase"] == GUIDED and state.global_step >= self.recorded["guided_steps"]:
            self._drop(kwargs["model"], kwargs.get("optimizer"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs.get("logs")
        if logs is not None and "loss" in logs:
            logs["alpha"] = self._alpha  # for the callbacks after this one
            if state.log_history:
                state.log_history[-1]["alpha"] = self._alpha

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.recorded["phase"] == GUIDED:
            warnings.warn(
                f"training stopped at step {state.global_step}, before the guided phase ended at step "
                f"{self.recorded['guided_steps']}; the guides are dropped, so that what is saved now is compact",
                stacklevel=2,
            )
            self._drop(kwargs["model"], kwargs.get("optimizer"))
        hooks_of(kwargs["model"]).remove()

    # What they do

    def _check_phase(self, state: TrainerState, model: nn.Module) -> str:
        """The phase in which this training begins; raises where checkpoint, model and arguments disagree."""
        if state.global_step == 0:
            if not any(guided_layers(model)):
                raise ConfigError(_no_guide(model))
            return GUIDED
        record = _record_in(state.stateful_callbacks)
        if record is None or record["phase"] is None:
            raise TrainingStateError(
                f"the checkpoint of step {state.global_step} was written without a GuidanceCallback; resume without it, "
                "or start a new run with it"
            )
        if record["phase"] == COMPACT:
            self.recorded = record
            return COMPACT
        require_guides(model, f"the checkpoint of step {state.global_step}", _MAKE_GUIDES)
        now = {"guided_steps": self._resolve_steps(state.max_steps), "alpha_schedule": self.alpha_schedule}
        changed = [f"{name} {record[name]!r} -> {value!r}" for name, value in now.items() if record[name] != value]
        if changed:
            raise TrainingStateError(
                f"the checkpoint of step {state.global_step} is of a run with another guided phase: {', '.join(changed)}; "
                f"use GuidanceCallback(guided_steps={record['guided_steps']}, alpha_schedule={record['alpha_schedule']!r})"
            )
        return GUIDED

    @property
    def _begins_guided(self) -> bool:
        return self.guided_ratio != 0 and self.guided_steps != 0

    def _resolve_steps(self, max_steps: int) -> int:
        if self.guided_steps is None:
            ratio = 0.25 if self.guided_ratio is None else self.guided_ratio
            steps = round(ratio * max_steps)
            if ratio > 0 and steps == 0:
                warnings.warn(
                    f"guided_ratio {ratio} of {max_steps} steps rounds to no guided step; the guides are dropped at once "
                    "(guided_steps=1 would keep them for one)",
                    stacklevel=2,
                )
            return steps
        if self.guided_steps > max_steps:
            raise ConfigError(
                f"guided_steps is {self.guided_steps}, and the training has {max_steps} steps; alpha must reach 0 before "
                f"it ends: use at most {max_steps}, or guided_ratio"
            )
        return self.guided_steps

    def _drop(self, model: nn.Module, optimizer: Any) -> None:
        hooks_of(model).stop_skipping()
        trainer = hooks_of(model).trainer()

        def rewrap() -> None:
            if trainer is not None:
                remake_ddp(trainer.accelerator, trainer.model_wrapped)

        drop_guides(model, optimizer, rewrap)
        self.recorded["phase"] = COMPACT


def phase_out(
    trainer: Trainer,
    guided_ratio: float | None = None,
    alpha_schedule: str = "cosine",
    guided_steps: int | None = None,
) -> GuidanceCallback:
    """Phase the guides of ``trainer.model`` out while this Trainer trains it; one line before ``trainer.train()``::

        trainer = Trainer(model, args, train_dataset=data)
        lowrank_ft.phase_out(trainer, guided_ratio=0.25)

    It does what ``callbacks=[GuidanceCallback(...)]`` does, with the same arguments and errors.

    Returns:
        The callback that was added.

    Raises:
        ConfigError: besides those of :class:`GuidanceCallback`, the trainer has such a callback already.
    """
    if any(isinstance(callback, GuidanceCallback) for callback in trainer.callback_handler.callbacks):
        raise ConfigError(
            "this Trainer phases its guides out already; call phase_out once, or pass one GuidanceCallback"
        )
    callback = GuidanceCallback(guided_ratio, alpha_schedule, guided_steps)
    _refuse_setups(trainer.args)
    prepare_before_training(trainer, callback.prepare_for_resume, callback._begins_guided)
    trainer.add_callback(callback)
    return callback


_MAKE_GUIDES = (
    "make the model as for the first step, with lowrank_ft.convert(model, ..., guide=...) or LowRankConfig(guide=...)"
)


def _record_in(callbacks: Any) -> dict[str, Any] | None:
    """This callback's part in ``TrainerState.stateful_callbacks``, a dictionary by class name."""
    entry = callbacks.get(GuidanceCallback.__name__)
    entry = entry[0] if isinstance(entry, list) else entry
    return None if entry is None else dict(entry["attributes"]["recorded"])


def _refuse_setups(args: TrainingArguments) -> None:
    kind = "DEEPSPEED" if args.deepspeed else AcceleratorState().distributed_type.name
    if kind in _INSTEAD:
        raise ConfigError(f"GuidanceCallback under {kind}: {_INSTEAD[kind]}")
    if args.torch_compile and args.world_size > 1:
        raise ConfigError(
            "GuidanceCallback with torch_compile on several processes: the compiled wrapper of DDP would keep the memory of "
            "the guides; set torch_compile=False, or train on one process"
        )


def _no_guide(model: nn.Module) -> str:
    if type(model).__module__.startswith("peft.") or hasattr(model, "peft_config"):
        return (
            "no active adapter of the model has a guide for GuidanceCallback to phase out; use "
            "LowRankConfig(guide='residual'), or leave the callback out"
        )
    if stored_form(model)[0]:
        return (
            "the model is compact and has no guide for GuidanceCallback to phase out; put one beside its factors with "
            "lowrank_ft.attach_guides(model, dense_model, 'residual'), or leave the callback out"
        )
    return (
        "the model has no factored linear, and GuidanceCallback nothing to phase out; convert it first: "
        "lowrank_ft.convert(model, param_ratio=0.6, guide='residual'), or get_peft_model(model, LowRankConfig(...))"
    )
