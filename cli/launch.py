"""Start ``accelerate launch`` on a recipe, or on a command itself; what follows ``--`` goes to accelerate."""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LAUNCHED = ("convert",)
"""Commands that several processes can run together."""
_GRACE_SECONDS = 15


class _Work(NamedTuple):
    """What is said of work that ends before its time."""

    name: str
    resume: str
    smaller: str


_TRAINING = _Work(
    "training",
    "if it had --save-steps, resume it with --resume-from-checkpoint auto",
    "lower --per-device-train-batch-size or --block-size, or add --gradient-checkpointing true",
)
_CONVERSION = _Work(
    "conversion",
    "the same command goes on if it had --stream, and begins anew if not",
    "start fewer processes, or add --stream, which reads one block at a time",
)


def add_usage(parser: argparse.ArgumentParser, name: str) -> None:
    """The options are those of the recipe, which explains them itself."""
    parser.usage = f"lowrank-ft {name} [--config FILE.yaml] [options of recipes/{name}.py] [-- options of accelerate]"


def launch_recipe(name: str, arguments: list[str]) -> int:
    """Run the recipe in processes of its own; returns their exit code."""
    mine, launch = _split(arguments)
    recipe = _recipe(name)
    if "--help" in mine or "-h" in mine:
        return subprocess.call([sys.executable, recipe, "--help"])
    if "--debug" in mine:
        os.environ["LOWRANK_FT_DEBUG"] = "1"
        mine = [a for a in mine if a != "--debug"]
    return _launch(launch, [recipe, *mine], _TRAINING)


def split_launch(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments of a command that can run in several processes, and what is accelerate's; nothing for others."""
    return _split(arguments) if arguments[0] in LAUNCHED else (arguments, [])


def launch_command(arguments: list[str], launch: list[str]) -> int:
    """Run a command of ours in the processes that accelerate starts; returns their exit code."""
    return _launch(launch, ["-m", "lowrank_ft_cli.main", *arguments], _CONVERSION)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What stands before ``--``, and what after it."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:cut], arguments[cut + 1 :]


def _launch(launch: list[str], program: list[str], work: _Work) -> int:
    """Run to the end; an interrupt reaches every process that the launcher started, and none is left behind."""
    command = [sys.executable, "-m", "lowrank_ft_cli.accelerated", *_quiet_defaults(launch), *launch, *program]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return exit_code(process.wait(), work)
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        with suppress(ProcessLookupError):  # all gone by themselves
            os.killpg(process.pid, signal.SIGKILL)
        print(f"error: interrupted; {work.resume}", file=sys.stderr)
        return 1


def exit_code(code: int, work: _Work = _TRAINING) -> int:
    """Our exit code for the launcher's: 1 where a signal ended the work, for 2 means wrong usage.

    The launcher passes a death by signal N on as -N, which a process can only say as 256 - N; a shell says 128 + N.
    """
    if 0 <= code <= 2:
        return code
    number = -code if code < 0 else 256 - code if code > 192 else code - 128
    if number == signal.SIGKILL:
        print(f"error: the {work.name} was killed, probably because memory ran out; {work.smaller}", file=sys.stderr)
    elif number > 0:
        with suppress(ValueError):
            print(f"error: the {work.name} was ended by {signal.Signals(number).name}", file=sys.stderr)
    return 1


def _recipe(name: str) -> str:
    package = importlib.util.find_spec("lowrank_ft_recipes")
    assert package is not None
    assert package.submodule_search_locations
    return str(Path(package.submodule_search_locations[0]) / f"{name}.py")


def _processes(launch: list[str], devices: int) -> int:
    """How many are asked for; where nothing is said, one for each GPU."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num_processes", type=int, default=devices)
    return int(parser.parse_known_args(launch)[0].num_processes)


def _quiet_defaults(launch: list[str]) -> list[str]:
    """What accelerate would assume anyway, said aloud so that it does not warn; nothing where the user configured it."""
    from accelerate.commands.config.config_args import default_config_file

    given = {argument.partition("=")[0] for argument in launch}
    if Path(default_config_file).is_file() or "--config_file" in given:
        return []
    import torch

    devices = torch.cuda.device_count()
    wanted = {
        "--num_processes": str(max(1, devices)),
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
    }
    flags = [part for flag, value in wanted.items() if flag not in given for part in (flag, value)]
    # Its name for several processes, on CPUs, too.
    if _processes(launch, devices) > 1 and not any(a.startswith(("--multi_gpu", "--use_", "--cpu")) for a in given):
        flags.append("--multi_gpu")
        if not given & {"--main_process_port", "--num_machines"}:
            flags += ["--main_process_port", "0"]  # any that is free
    if devices == 0:
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    # The recipe has printed its error by the time that the launcher would add a traceback of its own.
    return flags if "--quiet" in given else [*flags, "--quiet"]
