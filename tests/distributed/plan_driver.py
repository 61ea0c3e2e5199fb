"""Two processes that allocate ranks differently, as GPUs may; write the ranks that each of them converts to.

torchrun --standalone --nproc_per_node 2 -m tests.distributed.plan_driver FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.data.examples import pack
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.training import ModelArguments
from recipes import finetune


def main(folder: Path) -> None:
    rank = PartialState(cpu=True).process_index

    def allocate(model: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
        return make_plan(model, rank=6 + rank)

    finetune.allocate = allocate
    data = pack(np.random.default_rng(0).integers(3, 97, 40 * 32).astype(np.int32), 32)
    args = ModelArguments(model=str(folder / "dense"), param_ratio=0.5, guide="none", calibration_tokens=1024)
    model, _, _ = finetune.prepare_model(args, Source(args.model), data)
    ranks = {name: layer.rank for name, layer in lowrank_layers(model)}
    (folder / f"rank-{rank}.json").write_text(json.dumps(ranks))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
