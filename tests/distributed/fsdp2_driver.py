"""Training runs of a tiny guided model, one after the other, on as many processes as there are.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.fsdp2_driver RUNS.json

RUNS.json is a list of ``{"name": folder, "guide": kind, "options": {...}}``. Each run leaves in its folder what the
trainer leaves, the final weights, and ``watched-RANK.json``: what was seen at the end of every step.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from lowrank_ft.checkpoints.sharded import unique_tensors
from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.examples import pack
from lowrank_ft.nn import guided_layers
from lowrank_ft.training import TrainArguments, Trainer
from lowrank_ft.training import trainer as trainer_module
from lowrank_ft.training.resume import optimizer_tensors
from tests.conftest import keep_modules, tiny_llama
from tests.distributed.watching import SentBytes, live_bytes

STEPS, GUIDED, ACCUMULATION, BATCH = 6, 3, 2, 4  # BATCH: examples per forward pass, over all processes


class WatchedTrainer(Trainer):
    """Looks at the optimizer before and after the drop."""

    drop_changed: list[str] | None = None

    def _end_guidance(self) -> int:
        optimizer = self.optimizer.optimizer
        before = {k: _local(v).clone() for k, v in optimizer_tensors(self._bare, optimizer).items()}
        freed = super()._end_guidance()
        after = {k: _local(v) for k, v in optimizer_tensors(self._bare, optimizer).items()}
        changed = [k for k in before.keys() | after.keys() if k not in after or not torch.equal(before[k], after[k])]
        self.drop_changed = sorted(k for k in changed if ".guide." not in k)
        return freed


def train(folder: Path, guide: str, world: int, options: dict) -> None:
    options = dict(options)
    tie = options.pop("tie", False)
    model = tiny_llama(tie_word_embeddings=tie)
    teacher = tiny_llama(tie_word_embeddings=tie) if options.get("distill_weight") else None
    convert(model, rank=8, guide=guide)
    guide_bytes = sum(layer.guide.weight.numel() * 4 for _, layer in guided_layers(model))
    ids = np.random.default_rng(0).integers(3, 97, 60 * 16).astype(np.int32)
    data, held_out = pack(ids, 16).split(5)  # not a multiple of 2: the processes' shares differ
    seen: list[dict] = []
    sent = SentBytes()

    def look(step: int, trainer: Trainer) -> None:
        own = list(trainer._bare.parameters())
        state = optimizer_tensors(trainer._bare, trainer.optimizer.optimizer)
        seen.append({
            "step": step,
            "gathered": sent.bytes.pop("c10d::_allgather_base_", 0),
            "live": live_bytes() if world > 1 and step in (GUIDED - 1, GUIDED + 2) else None,
            "parameters": sum(_local(p).numel() * 4 for p in own),
            "optimizer": sum(_local(v).numel() * 4 for v in state.values()),
            "teacher": None if teacher is None else _held(teacher),
            "sharded": sum(isinstance(p, DTensor) for p in own),
            "of": len(own),
        })  # fmt: skip

    args = TrainArguments(**{
        "output_dir": str(folder), "max_steps": STEPS, "guided_ratio": GUIDED / STEPS, "learning_rate": 3e-3,
        "per_device_train_batch_size": BATCH // world, "gradient_accumulation_steps": ACCUMULATION, "logging_steps": 1,
        "per_device_eval_batch_size": 2, "max_grad_norm": 0.5, "seed": 3, "load_best_model_at_end": False, **options,
    })  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer_module.plot_run = lambda *_: False  # a picture takes longer than the training
    trainer = WatchedTrainer(model, args, data, held_out, on_step_end=look, teacher=teacher)
    accelerator = trainer.accelerator
    facts = {
        "world": accelerator.num_processes,
        "type": str(accelerator.distributed_type.value),
        "guide_bytes": guide_bytes,
    }
    with sent:
        result = trainer.train()
    facts |= {
        "drop_changed": trainer.drop_changed,
        "returned": sorted({p.device.type for p in result.parameters()}),
        "best_step": trainer.best_step,
        "seen": seen,
    }
    rank = accelerator.process_index
    (folder / f"watched-{rank}.json").write_text(json.dumps(facts))
    if rank == 0:
        assert result.lm_head.weight is result.model.embed_tokens.weight or not tie
        save_file(unique_tensors(result.state_dict()), folder / "final.safetensors")


def _held(model: torch.nn.Module) -> list[int]:
    """Numbers that this process holds of a model, and that there are."""
    own = list(model.parameters())
    return [sum(_local(p).numel() for p in own), sum(p.numel() for p in own)]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def main(plan: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    # A trainer ends with its process group; here the next run needs it, and a group cannot be made twice.
    PartialState.destroy_process_group = lambda self, group=None: None
    for run in json.loads(plan.read_text()):
        train(plan.parent / run["name"], run["guide"], world, run.get("options", {}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    keep_modules()
    main(Path(sys.argv[1]))
