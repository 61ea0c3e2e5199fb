"""A model whose weights stay in their files, and come into memory one module at a time.

Every module is "on disk", as accelerate calls it: its parameters are on the meta device, and a hook reads its weights before
its forward pass and drops them after it. So the whole model runs in the memory of its largest layer. A block that is worked
on for longer is loaded by :meth:`OnDisk.load`, and has no hooks any more.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lowrank_ft.checkpoints.architecture import check_headers, model_class
from lowrank_ft.checkpoints.files import read_headers
from lowrank_ft.checkpoints.models import check_finite, load_model, remember_origin
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.memory import give_back

_Place = tuple[Any, str]


@dataclass
class OnDisk:
    """A model of which nothing is in memory but buffers that are computed.

    Attributes:
        model: it runs, layer by layer, until its first module is loaded; then through blocks that are loaded only.
        device: where weights come to.
        name: what error messages call the model.
        places: where each weight is: a mapping that reads it, and its key there.
    """

    model: PreTrainedModel
    device: torch.device
    name: str
    places: dict[str, _Place] = field(repr=False)

    def read(self, name: str) -> Tensor:
        """One weight, in the dtype of the model, on the CPU."""
        mapping, key = self.places[name]
        found: Tensor = mapping[key]
        return found

    def load(self, name: str) -> nn.Module:
        """Bring the module ``name`` into memory, to stay there.

        Raises:
            NonFiniteError: a weight holds NaN or infinity.
        """
        module = self.model.get_submodule(name)
        self.unhook(name)
        for path, parent, leaf, parameter in _parameters(module):
            if parameter.is_meta:
                value = self.read(f"{name}.{path}").to(self.device)
                parent.register_parameter(leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
        check_finite(module, f"{self.name}: {name}")
        return module

    def unload(self, name: str) -> None:
        """Let the weights of a module go; :meth:`load` reads them again."""
        for _, parent, leaf, parameter in _parameters(self.model.get_submodule(name)):
            parent.register_parameter(leaf, nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad))
        give_back()

    def unhook(self, name: str = "") -> None:
        """From here on, the weights of this module do not come by themselves."""
        found = self.model.get_submodule(name)
        remove_hook_from_module(found, recurse=True)
        for module in found.modules():
            # accelerate leaves a module that holds its own method: a circle, which keeps the weights of a linear that is
            # replaced until Python looks for circles, after many more blocks.
            if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
                del module.__dict__["forward"]

    def bare(self) -> PreTrainedModel:
        """The model without weights, and without a trace of hooks."""
        self.unhook()
        model: Any = self.model
        model.__dict__.pop("hf_device_map", None)
        return self.model

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        """Inside, the module ``name`` is in memory."""
        try:
            yield self.load(name)
        finally:
            self.unload(name)


def open_on_disk(source: Source, dtype: str | torch.dtype, device: str, folder: Path) -> OnDisk:
    """Load nothing: only look where the weights are.

    Args:
        dtype: of the weights once they are read.
        folder: for weights that transformers does not take as they are stored (it joins or splits some).

    Raises:
        CheckpointNotFoundError, CheckpointError: as :func:`load_model`.
    """
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it would warn of what is asked for here
    try:
        # Where weights have to be renamed or joined, transformers does that, and reads all of them on the way.
        model = _dispatched(source, dtype) or load_model(source, dtype, offload_folder=folder)
    finally:
        logger.setLevel(level)
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            setattr(module, leaf, buffer.to(device))
    places = {}
    for path, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if getattr(hook, "weights_map", None) is None:
            continue
        for leaf, _ in module.named_parameters(recurse=False):
            places[f"{path}.{leaf}".lstrip(".")] = (hook.weights_map, leaf)
        hook.execution_device = torch.device(device)
    return OnDisk(model, torch.device(device), source.name, places)


def _dispatched(source: Source, dtype: str | torch.dtype) -> PreTrainedModel | None:
    """The model with its weights in the files of the checkpoint; None where those have other names than the model's."""
    config = source.load_config()
    source.check_adapter()
    folder = source.download()
    headers = read_headers(folder)  # says which file is damaged
    tensors = {name: str(info.file) for name, info in headers.items()}
    cls = model_class(config, source.name, source.trust_remote_code)
    if hasattr(cls, "_model_mapping"):  # an Auto class: code of the checkpoint's own, perhaps
        return None
    with init_empty_weights(include_buffers=False):
        model: Any = cls._from_config(config, dtype=config.dtype if dtype == "auto" else dtype)
    own = model.state_dict()
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if not tensors.keys() <= own.keys() or own.keys() - tensors.keys() - tied.keys() or own.keys() - parameters:
        return None
    check_headers(model, headers, source.name)
    index = {
        name: {"safetensors_file": tensors[stored], "weight_name": stored, "dtype": str(own[name].dtype).removeprefix("torch.")}
        for name in own
        if (stored := name if name in tensors else tied[name]) in tensors
    }  # fmt: skip
    if index.keys() != own.keys():
        return None
    dispatch_model(model, {"": "disk"}, offload_index=index)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    remember_origin(model, source.name, folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _parameters(module: nn.Module) -> list[tuple[str, nn.Module, str, nn.Parameter]]:
    """Path, owner, name and value of each parameter."""
    found = []
    for path, parameter in module.named_parameters(remove_duplicate=False):
        parent, _, leaf = path.rpartition(".")
        found.append((path, module.get_submodule(parent), leaf, parameter))
    return found
