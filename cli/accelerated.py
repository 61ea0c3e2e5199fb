"""``accelerate launch`` in a process of its own; of processes that failed, nothing is said but how the first one ended.

What failed has said why, so the launcher's summary and traceback would only hide it.
"""

import logging
import os
import sys


def main() -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOWRANK_FT_DEBUG" not in os.environ:
        logging.disable(logging.ERROR)
    try:
        launch_command(launch_command_parser().parse_args())
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        sys.exit(code if code >= 0 else 128 - code)  # as a shell says that a signal ended it


if __name__ == "__main__":
    main()
