"""Try every row and write down what came of it: ``python -m tests.architectures.measure``, two minutes of one thread.

The tables of docs/reference/architectures.md are made from it by docs/make_reference.py, and the tests of this folder
compare every row with it.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

from tests.architectures import decoders, encoders, mixtures, senses
from tests.architectures.check import RESULTS, check

GROUPS = {"decoders": decoders, "mixtures and hybrids": mixtures, "encoders": encoders, "senses": senses}


@contextmanager
def without_pictures() -> Iterator[None]:
    """Inside, a model is saved without a picture of its ranks, and transformers says nothing."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with patch("lowrank_ft.export.save_rank_map", return_value=False):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def main() -> None:
    torch.set_num_threads(1)
    began = time.process_time()
    groups: dict[str, list] = {}
    with without_pictures():
        for name, module in GROUPS.items():
            for row in module.ROWS:
                if row.missing:
                    print(f"left out: {row.cls}, for transformers {transformers.__version__} has no {row.missing}")
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    groups.setdefault(name, []).append(check(row, Path(folder)).to_dict())
    record = {"transformers": transformers.__version__, "groups": groups}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(map(len, groups.values()))} rows in {time.process_time() - began:.0f} s of one thread: {RESULTS}")


if __name__ == "__main__":
    main()
