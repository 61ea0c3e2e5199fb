"""AdamW in the forms that transformers names, and what each needs of the device.

    adamw_torch          float32 moments
    adamw_torch_fused    the same in one kernel for all parameters, without temporary copies of them
    adamw_8bit           moments in 8 bits, by blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861); bitsandbytes
    paged_adamw_8bit     likewise, in memory that moves to the host when the device runs short; bitsandbytes
    paged_adamw_32bit    float32 moments in such memory; bitsandbytes

A parameter of fewer than 4096 elements keeps float32 moments under the 8-bit forms too.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.costs.memory import OPTIMIZERS
from lowrank_ft.errors import ConfigError, MissingPackageError, TrainingStateError, require_choice

_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "adamw_bnb_8bit": "AdamW8bit",  # transformers has two names for it
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
}


def build_adamw(name: str, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """The optimizer called ``name``, one of ``OPTIMIZERS``, over parameter groups; ``options`` as AdamW has them.

    Raises:
        ConfigError: no such optimizer.
        MissingPackageError: it needs bitsandbytes.
    """
    require_choice("optim", name, OPTIMIZERS)
    if name not in _BITSANDBYTES:
        return torch.optim.AdamW(groups, fused=True if name == "adamw_torch_fused" else None, **options)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise MissingPackageError(
            f"optim {name} needs bitsandbytes: pip install lowrank-ft[quantized]; or use adamw_torch"
        ) from error
    optimizer: torch.optim.Optimizer = getattr(optim, _BITSANDBYTES[name])(groups, **options)
    return optimizer


def check_optimizer(name: str, device: torch.device, sharded: bool = False) -> None:
    """Raise unless the optimizer takes a step on this device, of a small parameter.

    Args:
        sharded: the parameters are going to be sharded tensors (FSDP).

    Raises:
        ConfigError: no such optimizer, or the device (or sharding) is not for it.
        MissingPackageError: it needs bitsandbytes.
    """
    parameter = nn.Parameter(torch.zeros(64, 64, device=device))
    parameter.grad = torch.zeros_like(parameter)
    try:
        with warnings.catch_warnings():
            # bitsandbytes warns where it falls back to memory that is not paged, and goes on.
            warnings.filterwarnings("error", message=".*not supported.*")
            build_adamw(name, [{"params": [parameter]}], lr=1e-3).step()
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError, UserWarning) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".") or type(error).__name__
        raise ConfigError(
            f"optim {name} cannot be used on the device {device} ({reason}); use adamw_torch, or another device"
        ) from error
    if sharded and name in _BITSANDBYTES:
        raise ConfigError(f"optim {name} does not take sharded parameters (FSDP); use adamw_torch or adamw_torch_fused")


def saved_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state of one parameter as tensors: what cannot be made anew. Step counters that are numbers become int64."""
    # The quantization maps are constants, one tensor for all parameters.
    return {
        key: value if isinstance(value, Tensor) else torch.tensor(value)
        for key, value in state.items()
        if not key.startswith("qmap")
    }


def restore_state(optimizer: Any, parameter: nn.Parameter, saved: dict[str, Tensor]) -> None:
    """The inverse of :func:`saved_state`, for a parameter that is in one of the optimizer's groups.

    Raises:
        TrainingStateError: the state is of another kind of optimizer.
    """
    if not hasattr(optimizer, "init_state"):
        # AdamW keeps its step counter on the CPU (the fused form beside the parameter), all else beside it.
        keep = not any(g.get("fused") for g in optimizer.param_groups)
        optimizer.state[parameter] = {
            key: value if key == "step" and keep else value.to(parameter.device) for key, value in saved.items()
        }
        return
    # bitsandbytes makes the state itself, so that paged memory is paged again and the maps are shared.
    for g, group in enumerate(optimizer.param_groups):
        for p, member in enumerate(group["params"]):
            if member is parameter:
                optimizer.init_state(group, member, g, p)
    state = optimizer.state[parameter]
    if saved_state(state).keys() != saved.keys():
        raise TrainingStateError(
            f"the checkpoint's optimizer state ({', '.join(sorted(saved))}) is not that of "
            f"{type(optimizer).__name__} ({', '.join(sorted(saved_state(state)))}); resume with the same --optim"
        )
    for key, value in saved.items():
        if isinstance(state[key], Tensor):
            state[key].copy_(value)
        else:
            state[key] = value.item()
