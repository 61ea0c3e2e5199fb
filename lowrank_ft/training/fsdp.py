"""FSDP2 for guided models: every process holds a part of each parameter, and of its gradient and optimizer state.

accelerate does the sharding (``fully_shard``), unit by unit: the parameters of a unit are gathered before it computes
and let go afterwards. What is special here:

- **Every guide is a unit of its own.** Inside a larger unit a guide that was deleted from the model would still be
  gathered, with the rest of its unit, at every step to the end of the run.
- **The drop forgets the guides' units.** The root keeps a list of all units, and would keep the shards alive.
- **The teacher** of distillation is sharded likewise, but it has no gradients and is no part of what accelerate prepares.
- **On the CPU** accelerate ignores the FSDP configuration and trains with DDP. Here it shards there, too, which is how
  this code is tested without GPUs.
- **The result** is gathered tensor by tensor on the main process, into a copy of the model made before the sharding:
  the sharded model itself cannot be turned back.

DeepSpeed shards behind an engine of its own, from which no parameter can be taken away: see :func:`refuse_deepspeed`.
"""

import copy
import dataclasses
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.fsdp import FSDPModule, fully_shard

from lowrank_ft.checkpoints.sharded import is_sharded
from lowrank_ft.errors import ConfigError, OutputError
from lowrank_ft.nn import guided_layers

_DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def refuse_deepspeed() -> None:
    """Raises ConfigError where accelerate is configured for DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "accelerate is configured for DeepSpeed, which cannot remove a guide during a run; use FSDP2 "
            "(recipes/configs/fsdp2.yaml), or train the compact model in a DeepSpeed script of your own, in which "
            "nothing is dropped (docs/how-to/scale-out.md)"
        )


def set_up(accelerator: Accelerator) -> None:
    """Check the launcher's configuration, and make FSDP2 work on the CPU. May be called again.

    Raises:
        ConfigError: a form of parallelism that is not supported, with what to use instead.
    """
    refuse_deepspeed()
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and accelerator.distributed_type == DistributedType.MULTI_CPU:
        _shard_on_cpu(accelerator)
    mesh = getattr(accelerator, "parallelism_config", None)
    for name in ("tp_size", "cp_size", "sp_size"):
        if (getattr(mesh, name, None) or 1) > 1:
            raise ConfigError(
                f"accelerate is configured with {name}={getattr(mesh, name)}; this recipe spreads the data over all "
                "processes, so leave it out (tensor parallelism in a loop of your own: docs/how-to/scale-out.md)"
            )
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        check_plugin(accelerator.state.fsdp_plugin)
        if not hasattr(checkpoint, "HuggingFaceStorageWriter"):
            raise ConfigError(
                f"torch {torch.__version__} cannot write sharded checkpoints as safetensors; update torch, or use DDP"
            )
    elif kind != DistributedType.NO and kind not in _DDP:
        raise ConfigError(
            f"accelerate is configured for {kind.value}; training runs on one process, with DDP "
            "(accelerate launch --multi_gpu) or with FSDP2 (--config_file recipes/configs/fsdp2.yaml)"
        )


def check_plugin(plugin: Any) -> None:
    """Raises ConfigError for settings of FSDP under which guides would be lost, or would stay after the drop."""
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

    if plugin.fsdp_version != 2:
        raise ConfigError("accelerate is configured for FSDP1, from which no guide can be dropped; set fsdp_version: 2")
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading leaves the model empty on all processes but the first, and every process "
            "makes factors and guides from it; set it to false"
        )
    policy = plugin.auto_wrap_policy
    if getattr(policy, "func", policy) is size_based_auto_wrap_policy:
        raise ConfigError(
            "fsdp_auto_wrap_policy SIZE_BASED_WRAP would put guides into larger units, which keep them after they are "
            "dropped; set TRANSFORMER_BASED_WRAP"
        )
    if plugin.activation_checkpointing:
        raise ConfigError(
            "fsdp_activation_checkpointing renames parameters, and checkpoints go by names; set it to false and use "
            "gradient_checkpointing, which does the same"
        )


def uses_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def parallelism(accelerator: Accelerator) -> str:
    """In a word, for the records: single, ddp or fsdp2."""
    if accelerator.distributed_type == DistributedType.NO:
        return "single"
    return "fsdp2" if uses_fsdp(accelerator) else "ddp"


def block_classes(model: nn.Module, accelerator: Accelerator) -> set[str]:
    """Names of the classes of the decoder blocks: what the configuration names, or else what transformers knows.

    Raises:
        ConfigError: the blocks are not known, or the model has no module of a configured class.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    present = {type(module).__name__ for module in model.modules()}
    wanted = set(plugin.transformer_cls_names_to_wrap or ()) - {"GuideLinear"} - _guide_classes(model)
    if unknown := sorted(wanted - present):
        raise ConfigError(
            f"fsdp_transformer_layer_cls_to_wrap names {unknown[0]}, and the model has no such module; leave it out, "
            f"or name the class of its blocks out of {', '.join(sorted(present))}"
        )
    blocks = wanted or set(getattr(model, "_no_split_modules", None) or ()) & present
    if not blocks:
        raise ConfigError(
            f"{type(model).__name__} does not say which of its modules are blocks; name their class in "
            "fsdp_transformer_layer_cls_to_wrap"
        )
    return blocks


def shard_frozen(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard a model that is read and not trained, block by block, in place; each process keeps its part on its device.

    The model may be another than the one that is trained, so its blocks are what transformers knows of it, or of the
    configured classes those that it has. A model of neither is one unit, gathered whole in each forward pass.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    names = set(getattr(model, "_no_split_modules", None) or plugin.transformer_cls_names_to_wrap or ())
    mesh = accelerator.torch_device_mesh
    where: dict[str, Any] = {"mesh": mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]} if mesh else {}
    if plugin.cpu_offload:
        where["offload_policy"] = plugin.cpu_offload
    for module in list(model.modules()):
        if type(module).__name__ in names and module is not model:
            fully_shard(module, reshard_after_forward=True, **where)
    fully_shard(model, reshard_after_forward=True, **where)


def choose_units(model: nn.Module, accelerator: Accelerator, blocks: set[str]) -> None:
    """Tell accelerate which modules become units: the decoder blocks, and every guide that is still there."""
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin: Any = accelerator.state.fsdp_plugin
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(blocks | _guide_classes(model))
    policy = plugin.mixed_precision_policy
    if policy is not None:
        # Half the bytes are gathered, but a sum over many processes wants more digits than bfloat16 has.
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32)


def require_shared_folder(folder: Path, accelerator: Accelerator) -> None:
    """Every process writes its part of a checkpoint there.

    Raises:
        OutputError: on all processes, if one of them does not see what the main process wrote.
    """
    mark = folder / ".seen-by-all"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    accelerator.wait_for_everyone()
    blind: Any = accelerator.reduce(torch.tensor(float(not mark.exists()), device=accelerator.device), "sum")
    if accelerator.is_main_process:
        mark.unlink()
    if blind.item():
        raise OutputError(
            f"--output-dir {folder} is not the same folder on {int(blind.item())} of {accelerator.num_processes} "
            "processes; sharded checkpoints need one in a file system that all nodes see"
        )


def require_same_model(model: nn.Module, accelerator: Accelerator) -> None:
    """Each process is about to keep its part of the model that it made itself; DDP would send that of the first.

    Raises:
        ConfigError: on all processes, if they did not make the same one: factors may differ from CPU to CPU.
    """
    with torch.no_grad():
        sums = [p.detach().double().sum() for p in model.parameters()]
    mine = torch.stack(sums).float().to(accelerator.device)
    every: Any = accelerator.gather(mine[None])
    if not bool((every == every[0]).all()):
        raise ConfigError(
            "the processes have made different factors, and shards of them do not fit together; convert first, with "
            "lowrank-ft convert, and train what it wrote"
        )


def guide_units(model: nn.Module) -> list[Any]:
    """The guides that are units, for :func:`forget_units` once they are dropped."""
    return [layer.guide for _, layer in guided_layers(model) if isinstance(layer.guide, FSDPModule)]


def forget_units(model: nn.Module, units: list[Any]) -> None:
    """Take units whose modules are gone from the list that the root keeps. torch has no public call for this."""
    try:
        root: Any = model
        context = root._get_fsdp_state()._state_ctx
        dead = {id(unit._get_fsdp_state()) for unit in units}
        context.all_states[:] = [state for state in context.all_states if id(state) not in dead]
    except AttributeError as error:
        warnings.warn(
            f"this torch keeps FSDP2's units elsewhere ({error}): training goes on and is right, but the memory of the "
            "guides is not freed; save a checkpoint and resume from it to free it",
            stacklevel=2,
        )


def reshard(model: nn.Module) -> None:
    """Let go of everything that is gathered: a forward pass without a backward pass leaves some of it behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of it, on every process; all must call this together."""
    gathered: Any = tensor
    return gathered.full_tensor() if is_sharded(tensor) else tensor


def skeleton(model: nn.Module) -> nn.Module:
    """A copy whose parameters are on the meta device, so it costs no memory; tied ones stay tied."""
    meta = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo=dict(meta))


def gather_into(target: nn.Module, model: nn.Module, keep: bool) -> nn.Module:
    """Put the whole parameters of the sharded ``model`` into ``target``, a skeleton of its shape, on the CPU.

    One tensor at a time is gathered; where ``keep`` is False (every process but the main one) it is let go at once,
    and the parameters of ``target`` stay on the meta device.
    """
    names = dict(target.named_parameters())
    gathered: dict[int, nn.Parameter] = {}
    for name, parameter in _in_the_same_order(model.named_parameters(), names):
        full = whole(parameter.detach())
        if keep:
            gathered[id(names[name])] = nn.Parameter(full.cpu(), parameter.requires_grad)
        del full
    if keep:
        for module in target.modules():
            for name, empty in list(module._parameters.items()):
                if empty is not None:
                    module._parameters[name] = gathered[id(empty)]
    buffers = dict(model.named_buffers())
    for name, buffer in target.named_buffers():
        buffer.copy_(buffers[name])
    return target


def _guide_classes(model: nn.Module) -> set[str]:
    # PEFT's guide is a marker without parameters, for the dense weight is not the guide's own there.
    return {type(layer.guide).__name__ for _, layer in guided_layers(model) if list(layer.guide.parameters())}


def _in_the_same_order(
    found: Iterable[tuple[str, nn.Parameter]], wanted: dict[str, nn.Parameter]
) -> list[tuple[str, nn.Parameter]]:
    pairs = list(found)
    assert [name for name, _ in pairs] == list(wanted), "the sharded model and its skeleton differ in shape"
    return pairs


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """What accelerate does for GPUs when it reads the same configuration; on the CPU it silently leaves it out."""
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState().distributed_type = DistributedType.FSDP  # accelerate copies it from here again and again
