"""What :class:`GuidanceCallback` changes about the ``transformers.Trainer`` that runs it.

A callback hears of a checkpoint only after its weights and its optimizer state are read, and never of the Trainer. So:

    in train(), first    the model takes the shape of the checkpoint that will be read, and under FSDP2 every guide
                         becomes a unit of its own (:func:`prepare_before_training`)
    at the drop          DDP and FSDP2 forget the guides (:func:`drop_guides`)
"""

import functools
import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from lowrank_ft.errors import ConfigError
from lowrank_ft.integrations.transformers_trainer.model_hooks import hooks_of
from lowrank_ft.nn import end_guidance, guided_layers
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


def prepare_before_training(trainer: Trainer, prepare: Callable[[nn.Module, Path], None]) -> None:
    """Let ``trainer.train`` call ``prepare(model, checkpoint)`` if it resumes, and choose the units of FSDP2.

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
            "the model was sharded before GuidanceCallback could make its guides units of FSDP2; hand the callback to "
            "Trainer as callbacks=[...] instead of add_callback"
        )


def drop_guides(model: nn.Module, optimizer: Any) -> None:
    """Take the guides from model, optimizer and whatever spreads the model over processes.

    Args:
        model: the one that Trainer holds: sharded under FSDP2, the inner one under DDP.
        optimizer: accelerate's or torch's, or None before there is one.
    """
    had_guides = any(guided_layers(model))
    fsdp.reshard(model)  # after an evaluation parameters may be gathered, and not those that the optimizer has
    units = fsdp.guide_units(model)
    end_guidance(model, getattr(optimizer, "optimizer", optimizer))
    if units:
        fsdp.forget_units(model, units)
    elif had_guides:
        _remake_ddp(hooks_of(model).trainer())


def _remake_ddp(trainer: Trainer | None) -> None:
    """Let DDP forget the guides. Nothing happens on one process.

    DDP holds every parameter that it was made with, and waits for the gradients of those that had one, so it has to be
    made anew. But Trainer's running loop has the old wrapper in a local variable, which nobody can exchange. So the old
    object is emptied, and takes over the attributes of the new one: both are then the same wrapper.
    """
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
