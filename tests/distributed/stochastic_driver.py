"""Train with stochastic dense guides and a fixed-FLOP end; write what each process saw.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.stochastic_driver OUTPUT BATCH_SIZE
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.examples import pack
from lowrank_ft.nn import guided_layers
from lowrank_ft.pretraining.options import PretrainArguments
from lowrank_ft.training import Trainer
from lowrank_ft.training.resume import unique_tensors
from tests.conftest import tiny_llama

STEPS, GUIDED, SEED = 8, 4, 5


def main(output: Path, batch_size: int) -> None:
    model = tiny_llama()
    convert(model, rank=6, guide="dense")
    data = pack(np.random.default_rng(0).integers(3, 97, 40 * 16).astype(np.int32), 16)
    seen: dict[str, Any] = {"finds_unused": []}

    def look(step: int, trainer: Trainer) -> None:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        seen["finds_unused"].append(getattr(trainer.model, "find_unused_parameters", None))
        if step == GUIDED - 1:
            guides = [layer.guide.weight for _, layer in guided_layers(trainer._bare)]
            seen["updates"] = [int(optimizer.state[w]["step"]) for w in guides]
        if step == trainer.max_steps:
            accelerator = trainer.accelerator
            seen.update(world=accelerator.num_processes, type=type(trainer.model).__name__)
            (output / f"rank-{accelerator.process_index}.json").write_text(json.dumps(seen))

    args = PretrainArguments(
        output_dir=str(output / "run"), max_steps=STEPS, guided_ratio=GUIDED / STEPS, learning_rate=1e-3, seed=SEED,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=2, logging_steps=1, guide_mode="stochastic",
        fixed_flops=True,
    )  # fmt: skip
    trainer = Trainer(model, args, data, on_step_end=look)
    trained = trainer.train()
    if trainer.accelerator.is_main_process:
        save_file(unique_tensors(trained.state_dict()), output / "final.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
