"""Which linears to factorize: PEFT's names, and PEFT's matching semantics.

A *linear* is an ``nn.Linear``, GPT-2's ``Conv1D`` or a subclass of ``nn.Linear`` that is known to compute the same
(both recognized by their class names, so that this module needs torch alone). The experts of a layer are stacked in one
parameter of three dimensions for each projection, and such a *stack* is a target like a linear, under the parameter's
name. A string pattern is a regular expression that must match the whole module name; a list holds names that match
exactly or as a dotted suffix. Where no target is given, the default is every linear and stack of the repeated blocks
that can be factorized alone, never an embedding or the output head.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_ft.errors import TargetError
from lowrank_ft.factorization.ranks import Shape

ALL_LINEAR = "all-linear"
Patterns = str | Sequence[str]

# A router or gate with a handful of outputs has nothing to factorize; it is a target only when it is named.
NARROWEST_DEFAULT_TARGET = 16

# Subclasses of nn.Linear that compute what it does: Falcon's rounds after the product and again after the bias.
_LIKE_LINEAR = ("FalconLinear",)

# Linears that are not called: the module that they belong to takes their weight and computes with it itself.
_READ_BY_OWNER = {
    "DisentangledSelfAttention": ("in_proj",),  # DeBERTa; DeBERTa-v2 has none of this name
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "MambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


@dataclass(frozen=True)
class LinearSpec:
    """Name and shape of one linear.

    Attributes:
        name: dotted path from the root of the model.
        shape: ``(out_features, in_features)``.
        bias: whether it has one.
        transposed: whether its weight is stored ``(in, out)``, as ``Conv1D`` does.
        experts: how many matrices of this shape are stacked under this name; 0 for a linear.
    """

    name: str
    shape: Shape
    bias: bool
    transposed: bool = False
    experts: int = 0


def is_linear(module: nn.Module) -> bool:
    # Exact classes only: subclasses (quantized, parametrized, masked linears) own their weights' meaning.
    return type(module) is nn.Linear or type(module).__name__ in _LIKE_LINEAR or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight ``(in, out)``: GPT-2's ``Conv1D``, known by name to need torch alone."""
    return type(module).__name__ == "Conv1D"


def linear_spec(name: str, module: Any) -> LinearSpec:
    if is_transposed(module):
        rows, columns = module.weight.shape
        return LinearSpec(name, (columns, rows), module.bias is not None, transposed=True)
    # Not the shape of the weight, which a quantized linear packs.
    return LinearSpec(name, (module.out_features, module.in_features), module.bias is not None)


def projections(module: nn.Module) -> list[str]:
    """Names of the projections that a module of experts holds as stacked parameters; none of any other module.

    The flags that transformers' ``use_experts_implementation`` sets say how such a module computes. Experts without them
    compute in ways of their own, and stay dense.
    """
    flags = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")
    if not all(hasattr(module, flag) for flag in flags):
        return []
    held = ((n, module._parameters.get(n)) for n in ("gate_up_proj", "up_proj", "down_proj"))
    return [name for name, weight in held if weight is not None and weight.dim() == 3]


def stack_specs(name: str, module: Any) -> list[LinearSpec]:
    """The stacks of the module ``name``; none where it is no module of experts."""
    specs = []
    for leaf in projections(module):
        experts, rows, columns = getattr(module, leaf).shape
        shape = (columns, rows) if module.is_transposed else (rows, columns)
        specs.append(LinearSpec(f"{name}.{leaf}", shape, module.has_bias, module.is_transposed, experts))
    return specs


def find_linears(model: nn.Module, counts: Callable[[nn.Module], bool] = is_linear) -> list[LinearSpec]:
    """Every linear of ``model``, in module order, and every stack; works on the meta device.

    Args:
        counts: says what a linear is. Where that is not the default, stacks are left out.
    """
    found: list[LinearSpec] = []
    for name, module in model.named_modules():
        if name and counts(module):
            found.append(linear_spec(name, module))
        elif name and counts is is_linear:
            found += stack_specs(name, module)
    return found


def place_of(name: str) -> str:
    """The same for all linears in the same place of their blocks: ``layers.3.mlp.up_proj`` is ``layers.*.mlp.up_proj``."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def matches(name: str, patterns: Patterns) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or dotted suffixes."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def as_patterns(values: Sequence[str] | None) -> Patterns | None:
    """Patterns from a command line: one value with a regular expression's characters is an expression for whole names."""
    if values is None or isinstance(values, str):
        return values
    if len(values) == 1 and (values[0] == ALL_LINEAR or re.search(r"[*+?|()\[\]^$\\]", values[0])):
        return values[0]
    return list(values)


def pattern_value(name: str, table: dict[str, int | float]) -> int | float | None:
    """The value of the first key of a ``rank_pattern`` that matches ``name``: a regular expression for its tail."""
    for pattern, value in table.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise TargetError(f"rank_pattern {pattern!r} is no valid regular expression: {error}") from None
    return None


def select_targets(
    model: nn.Module,
    target_modules: Patterns | None = None,
    exclude_modules: Patterns | None = None,
    counts: Callable[[nn.Module], bool] = is_linear,
) -> list[LinearSpec]:
    """The linears to factorize, in module order. ``counts`` says what a linear is.

    Raises:
        TargetError: a pattern matches no linear, is no valid regular expression, everything is excluded, a target
            shares its weight with another module (a tied output head), or the model is quantized.
    """
    _refuse_quantized(model, counts)
    linears = find_linears(model, counts)
    if not linears:
        raise TargetError(f"{type(model).__name__} has no nn.Linear or Conv1D module; there is nothing to factorize")
    _check_patterns("target_modules", target_modules, linears)
    _check_patterns("exclude_modules", exclude_modules, linears)
    if target_modules is None:
        chosen = [s for s in linears if _in_repeated_block(model, s) and not _is_output_head(model, s)]
        tied = tied_partners(model, [s.name for s in chosen])
        chosen = [s for s in chosen if s.name not in tied]
        if not chosen:
            raise TargetError(f"{type(model).__name__} {_why_nothing(model, counts)}; {_way_out(model, linears)}")
    elif target_modules == ALL_LINEAR:
        chosen = [s for s in linears if not _is_output_head(model, s)]
    else:
        chosen = [s for s in linears if matches(s.name, target_modules)]
    if target_modules in (None, ALL_LINEAR):
        chosen = [s for s in chosen if not is_read_by_owner(model, s.name) and not is_router(model, s.name)]
    if exclude_modules:
        chosen = [s for s in chosen if not matches(s.name, exclude_modules)]
        if not chosen:
            raise TargetError(f"exclude_modules {_show(exclude_modules)} removes every target; nothing is left")
    if not chosen:
        raise TargetError(f"target_modules {_show(target_modules or [])} name no linear; {_way_out(model, linears)}")
    refuse_tied(model, [s.name for s in chosen])
    return chosen


def _refuse_quantized(model: nn.Module, counts: Callable[[nn.Module], bool]) -> None:
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and not counts(module) and not weight.is_floating_point():
            raise TargetError(
                f"{name} is a {type(module).__name__}, quantized to {weight.dtype}; convert the model as it was before "
                "quantization, or train beside the quantized one with PEFT: get_peft_model(model, LowRankConfig(...))"
            )


def ffn_linears(model: nn.Module) -> list[LinearSpec]:
    """The default targets that belong to a feed-forward network: linears of the blocks outside of attention.

    Raises:
        TargetError: as :func:`select_targets`; or no linear of the blocks can be told to be attention's, so nothing
            says which of them are not.
    """
    blocks = select_targets(model)
    ffn = [s for s in blocks if is_ffn_linear(model, s)]
    if len(ffn) in (0, len(blocks)):
        raise TargetError(
            f"{type(model).__name__} does not tell feed-forward linears from attention by name; "
            f"name target_modules out of {_leaf_names(blocks)}"
        )
    return ffn


def is_ffn_linear(model: nn.Module, spec: LinearSpec) -> bool:
    """Whether a linear lies in a repeated block, in no module that is named after attention."""
    # Every architecture calls its attention that (self_attn, attn, SelfAttention); names of the FFN have less in common.
    attention = any(word in spec.name.lower() for word in ("attn", "attention"))
    return block_index(model, spec.name) is not None and not attention


def block_index(model: nn.Module, name: str) -> int | None:
    """Which of the repeated blocks (the outermost ``ModuleList``) a module lies in; None where it is in none."""
    parent: Any = model
    for part in name.split("."):
        if isinstance(parent, nn.ModuleList):
            return int(part)
        parent = getattr(parent, part)
    return None


def _why_nothing(model: nn.Module, counts: Callable[[nn.Module], bool]) -> str:
    """Why no linear is a default target."""
    inside = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and block_index(model, n) is not None
    ]
    strange = list(dict.fromkeys(type(m).__name__ for _, m in inside if not counts(m)))
    if strange:
        return f"has only linears of classes of its own in its repeated blocks ({', '.join(strange)})"
    if inside:
        return f"has no linear of at least {NARROWEST_DEFAULT_TARGET} inputs and outputs in its repeated blocks"
    return "has no repeated blocks with linears"


def _way_out(model: nn.Module, linears: list[LinearSpec]) -> str:
    names = _leaf_names([s for s in linears if not _is_output_head(model, s)])
    return f"name target_modules out of {', '.join(names)}" if names else "there is nothing to factorize"


def _in_repeated_block(model: nn.Module, spec: LinearSpec) -> bool:
    return min(spec.shape) >= NARROWEST_DEFAULT_TARGET and block_index(model, spec.name) is not None


def _is_output_head(model: nn.Module, spec: LinearSpec) -> bool:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return head is not None and not spec.experts and model.get_submodule(spec.name) is head


def is_read_by_owner(model: nn.Module, name: str) -> bool:
    """Whether the module around a linear is known to compute with its weight, where no factored layer can stand."""
    owner, _, leaf = name.rpartition(".")
    return leaf in _READ_BY_OWNER.get(type(model.get_submodule(owner)).__name__, ())


def is_router(model: nn.Module, name: str) -> bool:
    """Whether a linear chooses experts: by its name, or by an output for each expert of the config.

    It is small, and a small error of it sends tokens elsewhere.
    """
    if "router" in ".".join(name.lower().split(".")[-2:]):
        return True
    config: Any = getattr(model, "config", None)
    texts = {**vars(config), **vars(config.get_text_config())} if hasattr(config, "get_text_config") else {}
    counts = {v for k, v in texts.items() if k.endswith("experts") and isinstance(v, int)}
    owner, _, leaf = name.rpartition(".")
    module = getattr(model.get_submodule(owner), leaf)  # a stack of experts is a parameter, without out_features
    return "att" not in name.lower() and getattr(module, "out_features", 0) in counts - {0, 1}


def tied_partners(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Those of the named linears that share their weight with another module, and with which."""
    owners: dict[int, list[str]] = {}
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in own.items():
        owners.setdefault(id(parameter), []).append(name)
    # transformers carries tying out once weights are loaded, so on the meta device it has to be read as declared.
    declared = dict(getattr(model, "all_tied_weights_keys", None) or {})
    sources = {source: key for key, source in declared.items()}
    partners = {}
    for name in names:
        key = name if name in own else f"{name}.weight"  # a stack is a parameter itself
        others = [n for n in owners.get(id(own.get(key)), []) if n != key]
        partner = others[0] if others else declared.get(key, sources.get(key))
        if partner is not None:
            partners[name] = partner.removesuffix(".weight")
    return partners


def refuse_tied(model: nn.Module, names: Sequence[str]) -> None:
    """Raise a TargetError if one of the named linears shares its weight with another module."""
    for name, partner in tied_partners(model, names).items():
        raise TargetError(
            f"{name} shares its weight with {partner}, so it cannot be factorized alone; "
            f"take it out with exclude_modules {name.rpartition('.')[2]}, or untie the model first"
        )


def refuse_offloaded(module: Any, name: str) -> None:
    """Raise a TargetError if the weight of a linear, or a stack, is not in memory: offloaded to CPU or disk, or never read."""
    if getattr(module, "weight", module).is_meta:
        raise TargetError(
            f"the weight of {name} is on the meta device (offloaded to CPU or disk, or not loaded), so nothing "
            "can be computed from it; load the model without offloading, such as device_map='cpu'"
        )


def _check_patterns(option: str, patterns: Patterns | None, linears: list[LinearSpec]) -> None:
    if patterns is None or patterns == ALL_LINEAR:
        return
    if isinstance(patterns, str):
        try:
            re.compile(patterns)
        except re.error as error:
            raise TargetError(f"{option} {patterns!r} is no valid regular expression: {error}") from None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        single = pattern if isinstance(patterns, str) else [pattern]
        if any(matches(s.name, single) for s in linears):
            continue
        known = list(dict.fromkeys([*_leaf_names(linears), *(s.name for s in linears)]))
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else f"the linears are {', '.join(_leaf_names(linears))}"
        if "," in pattern:
            hint = f"give a list of names; on the command line, put spaces between them: {pattern.replace(',', ' ')}"
        if isinstance(patterns, str) and any(matches(s.name, [pattern]) for s in linears):
            hint = f"a string is a regular expression for whole names; for names or suffixes give a list: [{pattern!r}]"
        raise TargetError(f"{option} {pattern!r} matches no linear of the model; {hint}")


def _leaf_names(linears: list[LinearSpec]) -> list[str]:
    return list(dict.fromkeys(s.name.rpartition(".")[2] for s in linears))


def _show(patterns: Patterns) -> str:
    return patterns if isinstance(patterns, str) else " ".join(patterns)
