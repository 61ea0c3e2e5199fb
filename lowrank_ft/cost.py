"""What a factored model costs beside the dense one that it came from: parameters, and multiply-adds per token.

A linear of shape ``(out, in)`` takes ``out * in`` multiply-adds per token, a factored one ``rank * (out + in)``. Those
of all linears are counted, output head included, each once per token; one multiply-add is two FLOPs. Attention scores,
which grow with the context, norms, activations and the embedding's look-up are not counted.

A training step takes three times the multiply-adds of the forward pass: the output, the gradient of the input, and the
gradient of the weight. A weight that is not trained takes two, for it needs no gradient of its own.
"""

from dataclasses import dataclass

from torch import nn

from lowrank_ft.nn import GuidedLowRankLinear, lowrank_layers
from lowrank_ft.plan import LinearPlan, count_parameters
from lowrank_ft.ranks import dense_parameters
from lowrank_ft.targets import find_linears, kind_of

FLOPS_PER_MULTIPLY_ADD = 2
PASSES = 3  # of a trained linear: output, gradient of the input, gradient of the weight


@dataclass(frozen=True)
class Cost:
    """One of the two models.

    Attributes:
        parameters: of the whole model; tied weights count once.
        multiply_adds: per token, of all linears.
        factored: per token, of the linears that are factored in the converted model (and as many parameters).
    """

    parameters: int
    multiply_adds: int
    factored: int

    @property
    def flops(self) -> int:
        return FLOPS_PER_MULTIPLY_ADD * self.multiply_adds


@dataclass(frozen=True)
class Comparison:
    """A factored model and its dense origin.

    Attributes:
        linears: the factored linears, and those that stay dense where another block has a factored one.
    """

    dense: Cost
    compact: Cost
    linears: tuple[LinearPlan, ...]

    @property
    def param_ratio(self) -> float | None:
        """Over the factored linears; None where there are none."""
        return self.compact.factored / self.dense.factored if self.dense.factored else None


@dataclass(frozen=True)
class TrainingCost:
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


def training_cost(model: nn.Module) -> TrainingCost:
    """Count for a model with factored linears and, while they are there, their guides."""
    cost = compare(model)
    guide = sum(
        (PASSES if layer.kind == "dense" else PASSES - 1) * layer.in_features * layer.out_features
        for _, layer in lowrank_layers(model)
        if isinstance(layer, GuidedLowRankLinear) and layer.guide is not None
    )
    return TrainingCost(PASSES * cost.dense.multiply_adds, PASSES * cost.compact.multiply_adds, guide)


def compare(model: nn.Module) -> Comparison:
    """Count for a model with factored linears, which may be on the meta device; guides do not count."""
    layers = dict(lowrank_layers(model))
    dense = [s for s in find_linears(model) if s.name.rpartition(".")[0] not in layers]  # U and V lie in them
    before = sum(layer.in_features * layer.out_features for layer in layers.values())
    after = sum(layer.rank * (layer.in_features + layer.out_features) for layer in layers.values())
    rest = sum(dense_parameters(s.shape) for s in dense)
    guides = sum(
        p.numel()
        for layer in layers.values()
        if isinstance(layer, GuidedLowRankLinear) and layer.guide is not None
        for p in layer.guide.parameters()
    )
    parameters = count_parameters(model) - guides
    kinds = {kind_of(name) for name in layers}
    shapes = {s.name: s.shape for s in dense if kind_of(s.name) in kinds}
    linears = tuple(
        LinearPlan(name, (layer.out_features, layer.in_features), layer.rank)
        if (layer := layers.get(name)) is not None
        else LinearPlan(name, shapes[name], None, "dense")
        for name, _ in model.named_modules()
        if name in layers or name in shapes
    )
    return Comparison(
        Cost(parameters - after + before, rest + before, before), Cost(parameters, rest + after, after), linears
    )
