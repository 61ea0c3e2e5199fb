"""What :class:`GuidanceCallback` hangs on a model that ``transformers.Trainer`` holds: torch's own hooks.

A callback hears of an evaluation only after it ran, and is not asked when the best model is read at the end.
"""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lowrank_ft.nn import GuidedLowRankLinear, guided_layers, lowrank_layers
from lowrank_ft.training.guidance import skip_guides_in_evaluation


class ModelHooks:
    """Hooks on one model; :func:`hooks_of` makes them once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._loading = model.register_load_state_dict_pre_hook(_leave_out_guides)
        self._skipping: list[RemovableHandle] = []
        self.trainer: Callable[[], Any] = lambda: None
        """A weak reference to the Trainer that trains the model."""

    def skip_guides_in_evaluation(self) -> None:
        """In evaluation mode a guided layer computes what its export would; in training mode nothing changes."""
        model = self._model()
        assert model is not None
        self.stop_skipping()
        self._skipping += skip_guides_in_evaluation(model)

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


_HOOKS: "weakref.WeakKeyDictionary[nn.Module, ModelHooks]" = weakref.WeakKeyDictionary()


def hooks_of(model: nn.Module) -> ModelHooks:
    """The hooks of this model. They outlive a callback, which Trainer may replace when it resumes."""
    if model not in _HOOKS:
        _HOOKS[model] = ModelHooks(model)
    return _HOOKS[model]


def _leave_out_guides(model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """The best checkpoint may be of the guided phase, and the model at the end has no guides any more."""
    if any(guided_layers(model)):
        return
    prefixes = [f"{name}.{part}." for name, _ in lowrank_layers(model) for part in GuidedLowRankLinear.guide_state]
    for name, module in model.named_modules():  # adapters of PEFT
        prefixes += [f"{name}.{part}." for part in getattr(module, "guide_state", ())]
    for name in [k for k in state_dict if k.startswith(tuple(prefixes))]:
        del state_dict[name]
