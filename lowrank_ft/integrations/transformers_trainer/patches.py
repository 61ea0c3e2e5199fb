"""What :class:`GuidanceCallback` changes about the ``transformers.Trainer`` that runs it.

A callback hears of a checkpoint only after its weights and its optimizer state are read, and never of the Trainer. So:

    in train(), first    the model takes the shape of the checkpoint that will be read, and under FSDP2 every guide
                         becomes a unit of its own (:func:`prepare_before_training`); a reference model, which Trainer's
                         children make after they have called ``on_init_end``, gets the guides (:mod:`.references`)
"""

import functools
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from lowrank_ft.errors import ConfigError
from lowrank_ft.integrations.transformers_trainer.model_hooks import hooks_of
from lowrank_ft.integrations.transformers_trainer.references import give_reference_guides
from lowrank_ft.nn import guided_layers
from lowrank_ft.training import fsdp


def calling_trainer() -> Trainer | None:
    """The Trainer that is calling a callback right now. It tells callbacks of its state, and not of itself."""
    frame = inspect.currentframe()
    while frame is not None:
        # type() rather than isinstance(), which asks lazy modules for their class, and makes them import or warn.
        caller = frame.f_locals.get("self")
        if issubclass(type(caller), Trainer):
            return caller
        frame = frame.f_back
    return None


def prepare_before_training(trainer: Trainer, prepare: Callable[[nn.Module, Path], None], guided: bool = True) -> None:
    """Let ``trainer.train`` call ``prepare(model, checkpoint)`` if it resumes, and choose the units of FSDP2.

    Before both, and only if the first step will be ``guided``, a preference trainer's reference gets the guides, too.

    In place of the method of this one object: under FSDP2 Trainer makes the optimizer and shards the model before it
    reads anything of a checkpoint, so no hook on the model would come in time. With a ``model_init``
    it is the model that this makes for the run.
    """
    train, model_init = trainer.train, trainer.call_model_init

    @functools.wraps(train)
    def prepared_train(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(train).bind_partial(*args, **kwargs).arguments
        folder = given.get("resume_from_checkpoint")
        if folder is True:
            folder = get_last_checkpoint(str(trainer.args.output_dir))

        def prepared(model: nn.Module) -> nn.Module:
            if guided:
                give_reference_guides(trainer, model)
            if folder and Path(folder).is_dir():  # otherwise Trainer says what is wrong
                prepare(model, Path(folder))
            _make_guides_units(trainer, model)
            hooks_of(model).trainer = weakref.ref(trainer)
            return model

        if trainer.model_init is None:
            prepared(trainer.model)
        else:  # train() makes its model itself
            trainer.call_model_init = lambda *trial: prepared(model_init(*trial))  # type: ignore[method-assign]
        return train(*args, **kwargs)

    trainer.train = prepared_train  # type: ignore[method-assign]


def _make_guides_units(trainer: Trainer, model: nn.Module) -> None:
    """Raises ConfigError: settings of FSDP that do not go with guides, unknown blocks, factors that differ."""
    accelerator = trainer.accelerator
    if not fsdp.uses_fsdp(accelerator) or isinstance(model, FSDPModule):  # sharded by an earlier train()
        return
    plugin = accelerator.state.fsdp_plugin
    fsdp.check_plugin(plugin)
    if trainer.args.load_best_model_at_end and "FULL_STATE_DICT" in str(plugin.state_dict_type):
        raise ConfigError(
            "load_best_model_at_end under FSDP2: from one whole file torch reads no checkpoint of the guided phase into "
            "a model whose guides are gone; set state_dict_type to SHARDED_STATE_DICT, or load_best_model_at_end=False"
        )
    fsdp.require_same_model(model, accelerator)
    fsdp.choose_units(model, accelerator, fsdp.block_classes(model, accelerator))


def require_units(model: nn.Module) -> None:
    """Raises ConfigError if FSDP2 has put a guide into a larger unit, where it would stay after the drop."""
    if AcceleratorState().distributed_type != DistributedType.FSDP:
        return
    guides = [layer.guide for _, layer in guided_layers(model)]
    if any(list(guide.parameters()) and not isinstance(guide, FSDPModule) for guide in guides):
        raise ConfigError(
            "the model was sharded before GuidanceCallback could make its guides units of FSDP2; pass the callback to "
            "Trainer as callbacks=[...] instead of add_callback"
        )
