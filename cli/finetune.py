"""``lowrank-ft finetune``: start ``accelerate launch`` on the recipe; what follows ``--`` goes to accelerate."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run the recipe in processes of its own; returns their exit code."""
    mine, launch = arguments, []
    if "--" in arguments:
        cut = arguments.index("--")
        mine, launch = arguments[:cut], arguments[cut + 1 :]
    recipe = _recipe()
    mine = [a for a in mine if a != "--debug"]
    if "--help" in mine or "-h" in mine:
        return subprocess.call([sys.executable, recipe, "--help"])
    command = [sys.executable, "-m", "accelerate.commands.launch", *_quiet_defaults(launch), *launch, recipe, *mine]
    return min(1, subprocess.call(command))


def _recipe() -> str:
    package = importlib.util.find_spec("lowrank_ft_recipes")
    assert package is not None
    assert package.submodule_search_locations
    return str(Path(package.submodule_search_locations[0]) / "finetune.py")


def _quiet_defaults(launch: list[str]) -> list[str]:
    """What accelerate would assume anyway, said aloud so that it does not warn; left out where the user configured it."""
    from accelerate.commands.config.config_args import default_config_file

    if Path(default_config_file).is_file() or "--config_file" in launch:
        return []
    import torch

    wanted = {
        "--num_processes": str(max(1, torch.cuda.device_count())),
        "--num_machines": "1",
        "--mixed_precision": "no",
        "--dynamo_backend": "no",
    }
    if torch.cuda.device_count() > 1 and not any(a.startswith(("--multi_gpu", "--use_")) for a in launch):
        return ["--multi_gpu", *_missing(wanted, launch)]
    return _missing(wanted, launch)


def _missing(wanted: dict[str, str], launch: list[str]) -> list[str]:
    return [part for flag, value in wanted.items() if flag not in launch for part in (flag, value)]
