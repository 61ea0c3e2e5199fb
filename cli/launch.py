"""Start ``accelerate launch`` on a recipe; what follows ``--`` goes to accelerate."""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_GRACE_SECONDS = 15


def add_usage(parser: argparse.ArgumentParser, name: str) -> None:
    """The options are those of the recipe, which explains them itself."""
    parser.usage = f"lowrank-ft {name} [--config FILE.yaml] [options of recipes/{name}.py] [-- options of accelerate]"


def launch_recipe(name: str, arguments: list[str]) -> int:
    """Run the recipe in processes of its own; returns their exit code."""
    mine, launch = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        mine, launch = arguments[:cut], arguments[cut + 1 :]
    recipe = _recipe(name)
    if "--help" in mine or "-h" in mine:
        return subprocess.call([sys.executable, recipe, "--help"])
    if "--debug" in mine:
        os.environ["LOWRANK_FT_DEBUG"] = "1"
        mine = [a for a in mine if a != "--debug"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *_quiet_defaults(launch), *launch, recipe, *mine]
    return _run_group(command)


def _run_group(command: list[str]) -> int:
    """Run to the end; an interrupt reaches every process that the launcher started, and none is left behind."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return exit_code(process.wait())
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        with suppress(ProcessLookupError):  # all gone by themselves
            os.killpg(process.pid, signal.SIGKILL)
        print(
            "error: interrupted; if it had --save-steps, resume it with --resume-from-checkpoint auto", file=sys.stderr
        )
        return 1


def exit_code(code: int) -> int:
    """Our exit code for the launcher's: 1 where a signal ended the training, for 2 means wrong usage.

    The launcher passes a death by signal N on as -N, which a process can only say as 256 - N; a shell says 128 + N.
    """
    if 0 <= code <= 2:
        return code
    number = -code if code < 0 else 256 - code if code > 192 else code - 128
    if number == signal.SIGKILL:
        print(
            "error: the training was killed, probably because memory ran out; lower --per-device-train-batch-size or "
            "--block-size, or add --gradient-checkpointing true",
            file=sys.stderr,
        )
    elif number > 0:
        with suppress(ValueError):
            print(f"error: the training was ended by {signal.Signals(number).name}", file=sys.stderr)
    return 1


def _recipe(name: str) -> str:
    package = importlib.util.find_spec("lowrank_ft_recipes")
    assert package is not None
    assert package.submodule_search_locations
    return str(Path(package.submodule_search_locations[0]) / f"{name}.py")


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
    if devices > 1 and not any(a.startswith(("--multi_gpu", "--use_", "--cpu")) for a in given):
        flags.append("--multi_gpu")
    # The recipe has printed its error by the time that the launcher would add a traceback of its own.
    return flags if "--quiet" in given else [*flags, "--quiet"]
