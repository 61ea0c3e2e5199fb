"""What :class:`GuidanceCallback` hangs on a model that ``transformers.Trainer`` holds, and how DDP follows the drop.

A callback hears of a checkpoint only after its weights and its optimizer state are read, of an evaluation only after it
ran, and never of the Trainer itself. torch's own hooks on the model fill those gaps.
"""

import gc
import weakref
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback

from lowrank_ft.errors import TrainingStateError
from lowrank_ft.nn import GuidedLowRankLinear, compact_state_dict, end_guidance, guided_layers, lowrank_layers


class ModelHooks:
    """Hooks on one model; :func:`hooks_of` makes them once.

    Attributes:
        training: whether training has begun. Until then, weights that are read are those of a checkpoint to resume from,
            and decide whether there are guides; afterwards, those of the best model, which may be of an earlier phase.
    """

    def __init__(self, model: nn.Module) -> None:
        self.training = False
        self._model = weakref.ref(model)
        self._loading = model.register_load_state_dict_pre_hook(self._follow)
        self._skipping: list[RemovableHandle] = []

    def skip_guides_in_evaluation(self) -> None:
        """In evaluation mode a guided layer computes what its export would; in training mode nothing changes."""
        model = self._model()
        assert model is not None
        self.stop_skipping()
        for _, layer in guided_layers(model):
            self._skipping += [
                layer.register_forward_pre_hook(_hide_guide),
                layer.register_forward_hook(_show_guide, always_call=True),
            ]

    def stop_skipping(self) -> None:
        for handle in self._skipping:
            handle.remove()
        self._skipping.clear()

    def remove(self) -> None:
        """Leave the model as if it had never been hooked."""
        self.stop_skipping()
        self._loading.remove()
        model = self._model()
        if model is not None:
            _HOOKS.pop(model, None)

    def _follow(self, model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """``load_state_dict`` is about to copy ``state_dict`` into the model."""
        compact = compact_state_dict(model).keys()
        guides = model.state_dict().keys() - compact
        factors = [k for k in compact if k.endswith((".U.weight", ".V.weight")) or ".lowrank_" in k]
        whole = bool(factors) and all(k in state_dict for k in factors)  # and not an adapter, or one shard of many
        if guides and whole and not guides & state_dict.keys() and not self.training:
            end_guidance(model)  # Trainer makes the optimizer later
            return
        foreign = _foreign_guides(model, state_dict) if not guides else []
        if foreign and not self.training:
            raise TrainingStateError(
                f"the checkpoint is of the guided phase (it holds {foreign[0]}), and this model has no guide; make the "
                "model as for the first step, with lowrank_ft.convert(model, ..., guide=...) or LowRankConfig(guide=...)"
            )
        for name in foreign:
            del state_dict[name]


_HOOKS: "weakref.WeakKeyDictionary[nn.Module, ModelHooks]" = weakref.WeakKeyDictionary()


def hooks_of(model: nn.Module) -> ModelHooks:
    """The hooks of this model. They outlive a callback, which Trainer may replace when it resumes."""
    if model not in _HOOKS:
        _HOOKS[model] = ModelHooks(model)
    return _HOOKS[model]


def remake_ddp(callback: TrainerCallback) -> None:
    """Let DDP forget the guides. Nothing happens on one process.

    DDP holds every parameter that it was made with, and waits for the gradients of those that had one, so it has to be
    made anew. But Trainer's running loop has the old wrapper in a local variable, which nobody can exchange. So the old
    object is emptied, and takes over the attributes of the new one: both are then the same wrapper.
    """
    trainer = _trainer_of(callback)
    if trainer is None:
        return
    held, accelerator = trainer.model_wrapped, trainer.accelerator
    if not isinstance(held, DistributedDataParallel):
        return
    # Mixed precision wraps forward, and would do so twice.
    bare = accelerator.unwrap_model(held, keep_fp32_wrapper=False)
    accelerator._models.clear()  # accelerate keeps a reference, and has no way to drop one model
    vars(held).clear()  # with its reducer go the hooks on the gradients
    gc.collect()
    fresh = accelerator.prepare_model(bare)
    object.__setattr__(held, "__dict__", vars(fresh))


def _trainer_of(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that runs this callback. It gives callbacks no reference to itself, so the garbage collector is asked."""
    for found in gc.get_objects():
        # type() rather than isinstance(), which asks lazy modules for their class, and makes them import or warn.
        if issubclass(type(found), Trainer) and any(c is callback for c in found.callback_handler.callbacks):
            return found
    return None


def _foreign_guides(model: nn.Module, state_dict: dict[str, Any]) -> list[str]:
    """Names in ``state_dict`` that belong to guides of layers that have none here."""
    prefixes = [f"{name}.{part}." for name, _ in lowrank_layers(model) for part in GuidedLowRankLinear.guide_state]
    for name, module in model.named_modules():  # adapters of PEFT
        prefixes += [f"{name}.{part}." for part in getattr(module, "guide_state", ())]
    return [k for k in state_dict if k.startswith(tuple(prefixes))]


def _hide_guide(layer: Any, _: Any) -> None:
    if not layer.training:
        layer.guide_enabled = False


def _show_guide(layer: Any, *_: Any) -> None:
    if not layer.training:
        layer.guide_enabled = True
