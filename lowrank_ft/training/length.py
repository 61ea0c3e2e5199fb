"""How long a run is, and which of its steps are guided or repeat data: all of it known before the first step.

0 ....... guided ....... planned ......... total
|  guide   | factors alone  | factors alone, on the data of the guided phase again (``fixed_flops``)
"""

import warnings
from dataclasses import dataclass

from torch import nn

from lowrank_ft.costs.accounting import FORWARD_AND_BACKWARD
from lowrank_ft.costs.flops import attention_scores, step_cost
from lowrank_ft.errors import ConfigError
from lowrank_ft.nn import GuidedLowRankLinear, guided_layers
from lowrank_ft.schedule import data_step_at, mean_guide_cost, once_repeated_share, repeated_steps
from lowrank_ft.training.options import TrainArguments


@dataclass(frozen=True)
class RunLength:
    """Optimizer steps of a run.

    Attributes:
        planned: what ``max_steps`` or the epochs ask for.
        guided: how many of those, from the first on, have a guide.
        repeated: steps that ``fixed_flops`` adds at the end.
    """

    planned: int
    guided: int
    repeated: int

    @property
    def total(self) -> int:
        return self.planned + self.repeated

    def data_step(self, step: int) -> int:
        """The step whose data ``step`` sees."""
        return data_step_at(step, self.planned, self.guided)


def run_length(model: nn.Module, args: TrainArguments, planned: int, sequence_length: float) -> RunLength:
    """For a model with its guides still attached.

    Args:
        sequence_length: tokens of an example, on average, for what attention itself costs.

    Raises:
        ConfigError: an option for guides and no guided step; or ``fixed_flops`` where the costs are not known, or
            where the guided run costs more than the dense one already.
    """
    guides = [layer for _, layer in guided_layers(model)]
    if not guides:
        _require_guided_phase(args, "this model has no guide")
    if not args.fixed_flops:
        ratio = args.guided_ratio or 0.0
        guided = round(ratio * planned) if guides else 0
        if guided == 0:
            _require_guided_phase(args, "this run has no guided step")
            if guides and ratio > 0:
                warnings.warn(
                    f"guided_ratio {ratio:g} of {planned} steps rounds to no guided step; the guides are dropped at once",
                    stacklevel=3,
                )
        return RunLength(planned, guided, 0)
    if not all(isinstance(layer, GuidedLowRankLinear) for layer in guides):
        raise ConfigError(
            "fixed_flops counts guides that stand beside converted linears, and this model has those of a PEFT adapter; "
            "leave it out, or convert the model with lowrank_ft.convert(..., guide=...)"
        )
    cost = step_cost(model)
    scores = _scores(model, sequence_length)
    dense, factored = cost.dense + scores, cost.factored + scores
    if args.guided_ratio is None:
        guide = cost.guide * mean_guide_cost(planned, args.alpha_schedule, args.guide_mode)
        share = once_repeated_share(dense, factored, guide)
        guided = max(int(share * planned), int(share > 0))
    else:
        guided = round(args.guided_ratio * planned)
    if guided == 0:
        _require_guided_phase(args, "this run has no guided step")
    guide = cost.guide * mean_guide_cost(guided, args.alpha_schedule, args.guide_mode)
    return RunLength(planned, guided, repeated_steps(planned, guided, dense, factored, guide))


def _scores(model: nn.Module, sequence_length: float) -> int:
    """Multiply-adds of attention itself, per token and training step; 0 where the config does not tell."""
    try:
        return (
            FORWARD_AND_BACKWARD * attention_scores(getattr(model, "config", None), max(1, round(sequence_length)))[0]
        )
    except ConfigError:
        return 0


def _require_guided_phase(args: TrainArguments, problem: str) -> None:
    """Raise a ConfigError where an option asks for something of guides that are not there."""
    asked = "guide_mode stochastic" if args.guide_mode == "stochastic" else "fixed_flops" if args.fixed_flops else None
    if asked:
        raise ConfigError(
            f"{asked} needs a guided phase, and {problem}; take a low-rank model with a guide (--guide dense) and a "
            f"guided_ratio above 0, or leave {asked.split()[0]} out"
        )
