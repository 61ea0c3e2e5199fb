"""What each of two processes is told of two output folders, one of which another run uses: ``... -m MODULE OUTPUT``."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator

from lowrank_ft.errors import OutputError
from lowrank_ft.training.preparation import folder_alone


def main() -> None:
    accelerator = Accelerator()
    told = {}
    for name in ("free", "taken"):
        try:
            with folder_alone(name, accelerator):
                told[name] = ""
        except OutputError as error:
            told[name] = str(error)
    (Path(sys.argv[1]) / f"rank-{accelerator.process_index}.json").write_text(json.dumps(told))
    accelerator.end_training()


if __name__ == "__main__":
    main()
