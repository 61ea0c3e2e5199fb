"""One of several processes that tokenize as ``finetune`` does; each writes how many rows it tokenized itself.

accelerate launch --num_processes 2 tests/distributed/tokenize_driver.py OUTPUT [options of finetune]
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from recipes import finetune

seen: list[int] = []
stock = Dataset._map_single


@functools.wraps(stock)
def counting(**options: Any) -> Any:  # datasets calls it for what is not in its cache, and for nothing else
    seen.append(len(options["shard"]))
    return stock(**options)


def stop(_: int, *data: Any) -> None:
    """In the place of what ``finetune`` does next."""
    tokens = sum(len(part.ids) for part in data if part is not None)
    found = {"rows": seen, "tokens": tokens}
    (output / f"process-{os.environ['RANK']}.json").write_text(json.dumps(found))
    sys.exit()


if __name__ == "__main__":
    output = Path(sys.argv.pop(1))
    Dataset._map_single = staticmethod(counting)
    finetune.check_embeddings = stop
    finetune.main()
