"""What a factored model costs beside the dense one that it came from: parameters, and multiply-adds per token.

A linear of shape ``(out, in)`` takes ``out * in`` multiply-adds per token, a factored one ``rank * (out + in - rank)``
as it is stored and run, and ``rank * (out + in)`` as plain factors, in training. Those of all linears are counted,
output head included, each once per token; of the experts of a layer, as many as the config sends a token to
(``num_experts_per_tok``), and all of them where it does not say. One multiply-add is two FLOPs. Attention scores, which
grow with the context, norms, activations and the embedding's look-up are not counted. :func:`training_cost` is about a
whole training of a known context, and counts the scores too.

A training step takes three times the multiply-adds of the forward pass: the output, the gradient of the input, and the
gradient of the weight. A weight that is not trained takes two, for it needs no gradient of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_ft.costs.accounting import FLOPS_PER_MULTIPLY_ADD, FORWARD_AND_BACKWARD, Accounting, training_flops
from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.plan import LinearPlan, Plan, count_parameters
from lowrank_ft.factorization.ranks import dense_parameters
from lowrank_ft.factorization.targets import find_linears, is_ffn_linear, is_linear, place_of, projections
from lowrank_ft.nn import GuidedLowRankLinear, UnfoldedExperts, factored_stacks, lowrank_layers


@dataclass(frozen=True)
class Cost:
    """One of the two models.

    Attributes:
        parameters: of the whole model; tied weights count once.
        multiply_adds: per token, of all linears.
        factored: parameters of the linears that are factored in the converted model.
        factored_multiply_adds: per token, of the same linears: as many, but for experts.
    """

    parameters: int
    multiply_adds: int
    factored: int
    factored_multiply_adds: int

    @property
    def flops(self) -> int:
        return FLOPS_PER_MULTIPLY_ADD * self.multiply_adds


@dataclass(frozen=True)
class Comparison:
    """A factored model and its dense origin.

    Attributes:
        linears: the factored linears, and those that stay dense where another block has a factored one.
        numbers: parameters of the factored linears, by name, in the form that they have.
    """

    dense: Cost
    compact: Cost
    linears: tuple[LinearPlan, ...]
    numbers: dict[str, int]

    @property
    def param_ratio(self) -> float | None:
        """Over the factored linears; None where there are none."""
        return self.compact.factored / self.dense.factored if self.dense.factored else None

    @property
    def kept(self) -> float:
        """The same, over ``linears``: with those of their kinds that stay dense. 1 where there are none."""
        before = sum(p.dense_parameters for p in self.linears)
        return sum(p.parameters for p in self.linears) / before if before else 1.0


@dataclass(frozen=True)
class StepCost:
    """Multiply-adds per token of one training step, forward and backward, in which every linear is trained.

    Activations that gradient checkpointing computes again are not counted, nor is the optimizer.

    Attributes:
        dense: full fine-tuning of the dense model.
        factored: the factors in its place, and no guide.
        guide: what the guides add to that when all of them are computed.
    """

    dense: int
    factored: int
    guide: int

    def guided(self, share: float = 1.0) -> float:
        """With this share of the guides computed; under stochastic guidance that is alpha, on average."""
        return self.factored + share * self.guide


def step_cost(model: nn.Module) -> StepCost:
    """Count for a model with factored linears and, while they are there, their guides."""
    cost, used = compare(model), _uses(model)
    guide = sum(
        (FORWARD_AND_BACKWARD if layer.kind == "dense" else FORWARD_AND_BACKWARD - 1)
        * round(used(name, 0) * layer.in_features * layer.out_features)
        for name, layer in lowrank_layers(model)
        if isinstance(layer, GuidedLowRankLinear) and layer.guide is not None
    )
    return StepCost(
        FORWARD_AND_BACKWARD * cost.dense.multiply_adds, FORWARD_AND_BACKWARD * cost.compact.multiply_adds, guide
    )


def compare(model: nn.Module) -> Comparison:
    """Count for a model with factored linears, in the form they have; on the meta device, too. Guides do not count."""
    layers: dict[str, Any] = dict(lowrank_layers(model))
    dense = [s for s in find_linears(model) if s.name.rpartition(".")[0] not in layers]  # U and V lie in them
    layers |= dict(factored_stacks(model))
    used = _uses(model)
    numbers = {name: layer.numbers for name, layer in layers.items()}
    plans = {
        name: LinearPlan(
            name, (layer.out_features, layer.in_features), layer.rank, experts=getattr(layer, "experts", 0)
        )
        for name, layer in layers.items()
    }
    before, after = sum(p.dense_parameters for p in plans.values()), sum(numbers.values())
    adds_before = sum(round(used(p.name, p.experts) * p.dense_parameters) for p in plans.values())
    adds_after = sum(round(used(name, p.experts) * numbers[name]) for name, p in plans.items())
    rest = sum(round(used(s.name, s.experts) * (s.experts or 1) * dense_parameters(s.shape)) for s in dense)
    guides = sum(
        p.numel()
        for layer in layers.values()
        if isinstance(layer, GuidedLowRankLinear) and layer.guide is not None
        for p in layer.guide.parameters()
    )
    parameters = count_parameters(model) - guides
    kinds = {place_of(name) for name in layers}
    plans |= {s.name: LinearPlan(s.name, s.shape, None, "dense", s.experts) for s in dense if place_of(s.name) in kinds}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    # A stack is no module; it comes where its experts are.
    place = {name: order.get(name, order.get(name.rpartition(".")[0], 0)) for name in plans}
    return Comparison(
        Cost(parameters - after + before, rest + adds_before, before, adds_before),
        Cost(parameters, rest + adds_after, after, adds_after),
        tuple(sorted(plans.values(), key=lambda p: place[p.name])),
        numbers,
    )


def experts_per_token(model: nn.Module) -> int | None:
    """How many experts of a layer a token goes to, by the config of the model; None where that does not say so."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    known = (getattr(config, n, None) for n in ("num_experts_per_tok", "moe_topk", "top_k_experts"))
    return next((n for n in known if isinstance(n, int)), None)


def _uses(model: nn.Module) -> Callable[[str, int], float]:
    """How often a matrix of a name is multiplied with per token: once, or of ``experts`` the share that a token meets."""
    chosen = experts_per_token(model)
    lists = {
        f"{name}.{leaf}": len(getattr(module, leaf))
        for name, module in model.named_modules()
        if isinstance(module, UnfoldedExperts)
        for leaf in module.unfolded
    }

    def used(name: str, experts: int) -> float:
        count = experts or lists.get(name.rpartition(".")[0], 0)
        return min(1.0, chosen / count) if chosen and count else 1.0

    return used


@dataclass(frozen=True)
class TrainingCost:
    """A training of a causal language model, dense and as a plan makes it.

    Attributes:
        uncounted: what the FLOPs leave out although it multiplies matrices, in words; empty for most models.
    """

    dense: Accounting
    low_rank: Accounting
    uncounted: tuple[str, ...]


def training_cost(model: nn.Module, plan: Plan, tokens: int, sequence_length: int) -> TrainingCost:
    """Training FLOPs of ``model``, which may be on the meta device, and of what ``plan`` makes of it.

    The linears are those of the model itself; the widths of attention come from its config. See
    :mod:`lowrank_ft.costs.accounting` for the formula.

    Args:
        model: a dense causal language model of transformers.
        tokens: of the whole training.
        sequence_length: tokens of context.

    Raises:
        ConfigError: ``tokens`` or ``sequence_length`` is not positive, or the config does not say what attention costs.
    """
    for what, value in {"tokens": tokens, "sequence length": sequence_length}.items():
        if value < 1:
            raise ConfigError(f"{what} {value} is out of range; it must be 1 or more")
    used, found = _uses(model), find_linears(model)
    sizes = {s.name: (s.experts or 1) * dense_parameters(s.shape) for s in found}
    linears = sum(round(used(s.name, s.experts) * sizes[s.name]) for s in found)
    scores, unusual = attention_scores(model.config, sequence_length)
    saved = plan.target_parameters - plan.trained_parameters
    spared = sum(round(used(p.name, p.experts) * (p.dense_parameters - p.trained_parameters)) for p in plan.linears)
    ffn = {s.name: sizes[s.name] for s in found if is_ffn_linear(model, s)}
    factored = {p.name: p.trained_parameters for p in plan.linears if p.name in ffn}
    dense = Accounting(plan.model_parameters, sum(ffn.values()), training_flops(tokens, linears, scores))
    low_rank = Accounting(
        plan.model_parameters - saved,
        sum({**ffn, **factored}.values()),
        training_flops(tokens, linears - spared, scores),
    )
    return TrainingCost(dense, low_rank, (*unusual, *_matrices_outside_linears(model)))


def attention_scores(config: Any, sequence_length: int) -> tuple[int, tuple[str, ...]]:
    """Multiply-adds per token of attention itself, by a transformers config, and what of it could not be counted.

    Every layer of full attention costs ``sequence_length * (query width + value width)``; one that sees a window costs
    no more than the window.

    Raises:
        ConfigError: the number of layers or heads is not in the config, or differs from layer to layer.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, heads = _whole(config, "num_hidden_layers"), _whole(config, "num_attention_heads")
    # Keys and values may be narrower than queries (grouped heads), but each query meets them at its own width.
    head_dim = getattr(config, "head_dim", None) or _whole(config, "hidden_size") // heads
    # Multi-head latent attention names its widths apart, and means something else by head_dim.
    width = heads * (
        (getattr(config, "qk_head_dim", None) or head_dim) + (getattr(config, "v_head_dim", None) or head_dim)
    )
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    kinds = list(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers)
    span = {"full_attention": sequence_length}
    span |= dict.fromkeys(("sliding_attention", "chunked_attention"), min(sequence_length, window or sequence_length))
    others = sorted({k for k in kinds if k not in span})
    total = sum(span.get(kind, 0) * width for kind in kinds)
    return total, tuple(f"the mixing of tokens in {kinds.count(k)} layers of type {k}" for k in others)


def _whole(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{type(config).__name__} has {name} {value!r}, so the cost of its attention is not known; "
            "training FLOPs need one whole number there"
        )
    return value


def _matrices_outside_linears(model: nn.Module) -> tuple[str, ...]:
    """Kinds of modules with matrices that are neither linears, stacks nor embeddings, such as convolutions."""
    sizes: dict[str, int] = {}
    for module in model.modules():
        if is_linear(module) or isinstance(module, nn.Embedding) or projections(module):
            continue
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
        if size:
            sizes[type(module).__name__] = sizes.get(type(module).__name__, 0) + size
    return tuple(f"{size:,} parameters in {kind}" for kind, size in sizes.items())
