"""How a model is run: evaluation mode for a while, and no cache of keys and values."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no dropout; afterwards each module is in the mode it was in, and what took its place as well."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():  # parents come first, so children have the last word
            if name in modes:
                module.train(modes[name])


def without_cache(model: nn.Module) -> dict[str, Any]:
    """For a forward pass over whole sequences: the argument that turns the cache of keys and values off.

    Only where the model has one. A vision-language model's own config does not say so, but that of its text part.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = any(hasattr(c, "use_cache") for c in (config, text))
    return (
        {"use_cache": False}
        if known or "use_cache" in inspect.signature(getattr(model, "forward", model)).parameters
        else {}
    )
