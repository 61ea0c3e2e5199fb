"""Factored checkpoints of other tools, whose factors have other names: they become ours by renaming.

A checkpoint is the stock ``config.json`` of the dense architecture, and safetensors files. The factors of a linear ``NAME``
are two linears, applied one after the other::

    V   (r, in)    the first that the input meets
    U   (out, r)   the second, with the bias where there is one
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_ft.checkpoints.architecture import is_compact, model_class
from lowrank_ft.checkpoints.files import safetensors_files
from lowrank_ft.checkpoints.format import quantization_config
from lowrank_ft.checkpoints.models import check_finite
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.errors import CheckpointError, ConfigError


class FactorNames(NamedTuple):
    """How modules are called, with one ``*`` each for what they share: both factors, and the linear that they stand for."""

    U: str
    V: str
    name: str


KNOWN = {
    "svd-llm": FactorNames("*_u_proj", "*_v_proj", "*_proj"),
    "ab": FactorNames("*.B", "*.A", "*"),
}
"""Names of SVD-LLM (Wang et al. 2024, arXiv 2403.07378), and of modules that hold their two linears as ``A`` and ``B``."""


def factor_names(typed: str) -> FactorNames:
    """One of :data:`KNOWN`, or three patterns between commas: ``*.up,*.down,*``.

    Raises:
        ConfigError: it is neither.
    """
    if typed in KNOWN:
        return KNOWN[typed]
    parts = typed.split(",")
    if len(parts) != len(FactorNames._fields) or any(p.count("*") != 1 for p in parts) or len({*parts[:2]}) == 1:
        raise ConfigError(
            f"--factor-names {typed!r} is neither one of {', '.join(KNOWN)} nor three patterns with a * each: those of U, of V "
            "and of the linear, such as '*.B,*.A,*'"
        )
    return FactorNames(*parts)


def renamed(tensors: Mapping[str, Tensor], names: FactorNames) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors under the names of the compact format, and the ranks.

    Raises:
        CheckpointError: a factor has no partner, or one of another rank.
    """
    left, right = (re.compile(_as_regex(p) + r"\.weight") for p in (names.U, names.V))
    found: dict[str, dict[str, str]] = {}
    for key in tensors:
        for kind, pattern in (("U", left), ("V", right)):
            if (match := pattern.fullmatch(key)) is not None:
                found.setdefault(names.name.replace("*", match[1]), {})[kind] = key
    state, ranks = dict(tensors), dict[str, int]()
    for name, keys in found.items():
        if len(keys) == 1:
            ((kind, key),) = keys.items()
            raise CheckpointError(f"{key} is a factor {kind}, and its partner is missing; check --factor-names")
        u, v = state.pop(keys["U"]), state.pop(keys["V"])
        if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0]:
            raise CheckpointError(
                f"{keys['U']} is {tuple(u.shape)} and {keys['V']} is {tuple(v.shape)}; U must be (out, r) and V (r, in)"
            )
        bias = state.pop(keys["U"].removesuffix("weight") + "bias", None)
        state |= {f"{name}.U.weight": u, f"{name}.V.weight": v, f"{name}.weight": torch.zeros(1, dtype=u.dtype)}
        if bias is not None:
            state[f"{name}.bias"] = bias
        ranks[name] = len(v)
    return state, ranks


def load_foreign(folder: Path, names: FactorNames, trust_remote_code: bool = False) -> PreTrainedModel:
    """A compact model of another tool's factored checkpoint.

    Raises:
        CheckpointError: nothing in it has such names, or what is there does not fit the architecture of its config.
    """
    source = Source(str(folder), trust_remote_code=trust_remote_code)
    config: Any = source.load_config()
    if is_compact(config):
        raise CheckpointError(f"{folder} is a compact checkpoint already; leave --factor-names out")
    state, ranks = renamed({k: v for file in safetensors_files(folder) for k, v in load_file(file).items()}, names)
    if not ranks:
        raise CheckpointError(
            f"no tensor of {folder} is called {names.U}.weight or {names.V}.weight (the first is {min(state, default='none')}); "
            "check --factor-names"
        )
    config.quantization_config = quantization_config(ranks)
    cls: Any = model_class(config, str(folder), trust_remote_code)
    if not hasattr(cls, "config_class"):  # one of the Auto classes
        raise CheckpointError(
            f"{folder}/config.json names no class of transformers that the model is; add it as "
            '"architectures": ["LlamaForCausalLM"]'
        )
    try:
        model, info = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=next(iter(state.values())).dtype, output_loading_info=True
        )
    except ValueError as error:  # a name that the architecture does not have
        raise CheckpointError(f"{folder}: {error}; check --factor-names") from error
    for kind, problem in (("missing_keys", "lacks"), ("unexpected_keys", "has, besides what its config needs,")):
        if info[kind]:
            raise CheckpointError(f"{folder} {problem} {min(info[kind])}; check --factor-names and config.json")
    check_finite(model, folder)
    return model


def _as_regex(pattern: str) -> str:
    before, after = map(re.escape, pattern.split("*"))
    return f"{before}(.+){after}"
