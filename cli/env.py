"""``lowrank-ft env``: what a bug report needs, and nothing that says whose machine it is."""

import argparse
import platform

HELP = "print versions, platform and devices, to put into a bug report"
_PACKAGES = (
    "lowrank-ft", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub", "bitsandbytes",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(options: argparse.Namespace) -> None:
    found = {name: _version(name) for name in _PACKAGES}
    found |= {"python": f"{platform.python_implementation()} {platform.python_version()}"}
    # Not platform.platform() or uname(): they may hold the name of the machine, or of who built its kernel.
    system = (platform.system(), platform.machine(), *platform.libc_ver())
    found |= {"platform": " ".join(part for part in system if part), "devices": _devices()}
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    """The CPU's threads, and the accelerators that torch can use."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what some reports are about
        return f"unknown, importing torch failed ({type(error).__name__})"
    shown = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        version = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
        module = getattr(torch, kind, None)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else ""
            shown.append(f"{kind}:{index} ({name or 'no name'}{version})")
    return ", ".join(shown)
