"""Guided models under ``transformers.Trainer``, for tests in this process, in one that is killed, and in several.

    python -m tests.callback_driver OUTPUT KIND ... [--resume STEP ...] [--kill-at STEP] [--batch SIZE] [--dropout P]

A KIND is the guide of ``convert`` (``dense``, ``residual``) or that of PEFT (``peft-residual``).
With ``ACCELERATE_USE_FSDP=true`` on several processes the model is sharded, which accelerate leaves out on the CPU.
A random Llama with dropout, 8 steps of two micro-batches, 4 steps guided, a checkpoint after every second. What
happened goes to ``OUTPUT/KIND/straight-RANK.json``. ``--resume`` trains again from those checkpoints, without training
from the beginning if there is a run already, and writes ``from-STEP-RANK.json``.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import lowrank_ft
from lowrank_ft import GuidanceCallback, LowRankConfig
from lowrank_ft.nn import guided_layers
from lowrank_ft.training import fsdp
from tests.conftest import ROOT, keep_modules, tiny_llama
from tests.distributed.watching import live_bytes

STEPS, GUIDED = 8, 4


class ShardingTrainer(Trainer):
    """Sees FSDP in the launcher's configuration on the CPU, too."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        fsdp.set_up(self.accelerator)
        self.is_fsdp_enabled = fsdp.uses_fsdp(self.accelerator)


def make_model(kind: str, dropout: float = 0.2, rank: int = 8) -> Any:
    model = tiny_llama(attention_dropout=dropout)
    if kind.startswith("peft-"):
        return get_peft_model(model, LowRankConfig(r=rank, guide=kind.removeprefix("peft-")))
    lowrank_ft.convert(model, rank=rank, guide=kind)
    return model


def make_data(examples: int = 40, length: int = 12, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    ids = torch.from_numpy(np.random.default_rng(seed).integers(3, 97, (examples, length)))
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(
    model: Any, output: Path, *callbacks: TrainerCallback, eval_data: Any = None, **options: Any
) -> Trainer:
    settings = dict(
        output_dir=str(output), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=3e-3,
        gradient_accumulation_steps=2, logging_steps=1, save_steps=2, report_to=[], disable_tqdm=True, seed=3,
    )  # fmt: skip
    model_init = options.pop("model_init", None)
    args = TrainingArguments(**{**settings, **options})
    return ShardingTrainer(
        model, args, train_dataset=make_data(), eval_dataset=eval_data, model_init=model_init, callbacks=list(callbacks)
    )


def guide_references(model: nn.Module) -> list[weakref.ref]:
    """To every tensor of every guide."""
    tensors: list[torch.Tensor] = []
    for _, layer in guided_layers(model):
        for part in layer.guide_state:
            holder = getattr(layer, part)
            tensors += list(holder.parameters() if part == "guide" else holder.values())
    return [weakref.ref(t) for t in tensors]


class Watch(TrainerCallback):
    """How many tensors of guides are alive after each step; kills the process once the checkpoint ``kill_at`` is there."""

    def __init__(self, model: nn.Module, kill_at: int | None = None) -> None:
        self.references, self.kill_at = guide_references(model), kill_at
        self.alive: dict[int, int] = {}
        self.live_bytes: dict[int, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.references += guide_references(kwargs["model"])  # moving a model may make other tensors of its buffers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gc.collect()
        self.alive[state.global_step] = len({id(t) for r in self.references if (t := r()) is not None})
        self.live_bytes[state.global_step] = live_bytes()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """What ``save_model`` wrote: a model or an adapter."""
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def launch(output: Path, kinds: tuple[str, ...], resumed: tuple[int, ...], **environment: str) -> None:
    """This driver on two processes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.callback_driver", str(output), *kinds, "--batch", "1", "--dropout", "0",
        "--resume", *map(str, resumed),
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=output, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def outcome(output: Path, kind: str, run: str) -> tuple[list[dict[str, Any]], Path]:
    """What both processes of :func:`launch` wrote of a run, and its folder."""
    return [json.loads((output / kind / f"{run}-{rank}.json").read_text()) for rank in (0, 1)], output / kind / run


def series(trainer: Trainer, key: str) -> list[Any]:
    return [e[key] for e in trainer.state.log_history if key in e]


def train(kind: str, output: Path, options: argparse.Namespace, resume: int | None) -> None:
    model = make_model(kind, options.dropout)
    watch = Watch(model, options.kill_at)
    callback = GuidanceCallback(guided_ratio=GUIDED / STEPS)
    name = "straight" if resume is None else f"from-{resume}"
    folder = output / name
    trainer = make_trainer(
        model, folder, callback, watch, per_device_train_batch_size=options.batch, bf16=options.bf16,
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    checkpoint = None if resume is None else output / "straight" / f"checkpoint-{resume}"
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_fsdp_enabled:  # of shards, Trainer writes no model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder / "final"))
    entry = {
        "world": trainer.accelerator.num_processes,
        "type": type(trainer.model_wrapped).__name__,
        "alive": watch.alive,
        "live_bytes": watch.live_bytes,
        "sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "losses": series(trainer, "loss"),
        "alphas": series(trainer, "alpha"),
        "optimized": sum(len(group["params"]) for group in trainer.optimizer.param_groups),
        "checksum": sum(p.detach().double().abs().sum().item() for p in trainer.model.parameters()),
    }
    (output / f"{name}-{trainer.args.process_index}.json").write_text(json.dumps(entry))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--resume", type=int, nargs="*", default=[])
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    for kind in options.kinds:
        output = options.output / kind
        if not (output / "straight").exists():
            train(kind, output, options, None)
        for step in options.resume:
            train(kind, output, options, step)


if __name__ == "__main__":
    keep_modules()
    main()
