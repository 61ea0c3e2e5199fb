"""A short training run for tests that kill it: ``python -m tests.training_driver OUTPUT GUIDE [options]``.

GUIDE may also be ``distilled``: a residual guide, and distillation on text of its own; ``packed``: a residual guide in
4 bits, and AdamW with 8-bit moments (of the two matrices that are large enough for them); or ``stochastic``: a dense
guide with gates, and steps on the guided phase's data again at the end.
A random Llama with dropout, 12 steps of which 6 are guided, a checkpoint after each. ``--kill-at STEP`` sends SIGKILL
to itself when that step is complete, ``--kill-in-save STEP`` while its checkpoint is half written.
"""

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.examples import pack
from lowrank_ft.pretraining.options import PretrainArguments
from lowrank_ft.training import TrainArguments, Trainer, resume
from tests.conftest import tiny_llama

STEPS, GUIDED = 12, 6


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("guide")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-in-save", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    distill, packed, stochastic = (options.guide == name for name in ("distilled", "packed", "stochastic"))
    model = tiny_llama(attention_dropout=0.2, hidden_size=64 if packed else 32)
    kind = "residual" if distill or packed else "dense" if stochastic else options.guide
    convert(model, rank=8, guide=kind, guide_bits=4 if packed else None)
    ids = np.random.default_rng(0).integers(3, 97, 40 * 16).astype(np.int32)
    train, held_out = pack(ids, 16).split(8)
    gates: dict[str, Any] = dict(guide_mode="stochastic", fixed_flops=True) if stochastic else {}
    args = (PretrainArguments if stochastic else TrainArguments)(
        output_dir=str(options.output), max_steps=STEPS, guided_ratio=GUIDED / STEPS, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1, eval_steps=4, save_steps=1, seed=5,
        resume_from_checkpoint="auto" if options.resume else None, load_best_model_at_end=False,
        distill_weight=0.5 if distill else 0.0, optim="adamw_8bit" if packed else "adamw_torch",
        **gates,
    )  # fmt: skip
    if options.kill_in_save is not None:
        commit = resume.commit

        def commit_or_die(draft: Path, final: Path, keep: int) -> None:
            if final.name == f"step-{options.kill_in_save:08d}":
                kill()
            commit(draft, final, keep)

        resume.commit = commit_or_die
    torch.manual_seed(7)
    Trainer(
        model, args, train, held_out, on_step_end=lambda step, _: kill() if step == options.kill_at else None,
        teacher=tiny_llama() if distill else None, distill_data=pack(ids[::-1].copy(), 12) if distill else None,
    ).train()  # fmt: skip
    save_file(resume.unique_tensors(model.state_dict()), options.output / "final.safetensors")


if __name__ == "__main__":
    main()
