"""What a training costs, in FLOPs. Pure arithmetic.

    FLOPs = 6 * tokens * (linears + scores)

    linears   multiply-adds per token of all linears, output head included: out * in, or rank * (out + in)
    scores    multiply-adds per token of attention itself: context * (query width + value width), over the layers

One multiply-add is two FLOPs, and a backward pass costs twice its forward pass: hence 6. The scores are counted over
the whole context, causal mask or not. Not counted: norms, activations, the softmax, the embedding's look-up, the
optimizer. This is the count behind the tables of Wei et al. (2024, arXiv 2407.09835), which it gives to the digit
(:mod:`lowrank_ft.pretraining.presets`).
"""

from dataclasses import dataclass

FLOPS_PER_MULTIPLY_ADD = 2
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Accounting:
    """Size of a model, and the cost of a training of it.

    Attributes:
        parameters: of the whole model; tied weights count once.
        ffn_parameters: weights of the feed-forward linears, without biases.
        training_flops: of the whole training, forward and backward.
    """

    parameters: int
    ffn_parameters: int
    training_flops: int


def training_flops(tokens: int, linears: int, scores: int) -> int:
    """The formula of this module; ``linears`` and ``scores`` are multiply-adds per token."""
    return FORWARD_AND_BACKWARD * FLOPS_PER_MULTIPLY_ADD * tokens * (linears + scores)
