"""Two processes train a guided model; each writes how many guide weights are alive after the drop.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.guide_memory_driver OUTPUT GUIDE
"""

import gc
import json
import sys
import weakref
from pathlib import Path

import numpy as np

from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.examples import pack
from lowrank_ft.nn import guided_layers
from lowrank_ft.training import TrainArguments, Trainer
from tests.conftest import keep_modules, tiny_llama


def main(output: Path, guide: str) -> None:
    model = tiny_llama()
    convert(model, rank=8, guide=guide)
    guides = [weakref.ref(layer.guide.weight) for _, layer in guided_layers(model)]
    data = pack(np.random.default_rng(0).integers(3, 97, 40 * 16).astype(np.int32), 16)
    counts = {}

    def look(step: int, trainer: Trainer) -> None:
        gc.collect()
        counts[step] = sum(g() is not None for g in guides)
        if step == 8:
            accelerator = trainer.accelerator
            entry = {"alive": counts, "world": accelerator.num_processes, "type": type(trainer.model).__name__}
            (output / f"rank-{accelerator.process_index}.json").write_text(json.dumps(entry))

    args = TrainArguments(
        output_dir=str(output / "run"), max_steps=8, guided_ratio=0.5, per_device_train_batch_size=2, learning_rate=1e-3
    )
    Trainer(model, args, data, on_step_end=look).train()


if __name__ == "__main__":
    keep_modules()
    main(Path(sys.argv[1]), sys.argv[2])
