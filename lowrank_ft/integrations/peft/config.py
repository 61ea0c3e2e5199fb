"""Options of the PEFT method ``lowrank``."""

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from peft.config import PeftConfig
from peft.utils import PeftType
from torch import nn

from lowrank_ft.errors import ConfigError, require_choice
from lowrank_ft.factorization.plan import Plan, make_plan
from lowrank_ft.factorization.targets import Patterns

PEFT_TYPE = "LOWRANK"
PEFT_GUIDES = ("residual", "none")
BIASES = ("none", "all", "lowrank_only")


@dataclass
class LowRankConfig(PeftConfig):
    """Replace linears ``W (out, in)`` by factors ``U (out, r) @ V (r, in)``, and train those.

    Where PEFT has a name for an option, this is PEFT's name with PEFT's meaning.

    Attributes:
        r: rank; a float in (0, 1] is a fraction of ``min(out, in)``, so 1.0 is full rank and 1 is rank one.
        target_modules: a regular expression, or a list of names or dotted suffixes, or ``"all-linear"``. None means
            every linear of the repeated blocks, as everywhere in this package.
        exclude_modules: what to leave out of that.
        rank_pattern: module name or regular expression to rank, for linears that differ from ``r``.
        guide: ``residual`` or ``none`` (see :mod:`lowrank_ft.integrations.peft.layer`).
        alpha: share of the guide, 0 to 1. It is not LoRA's ``lora_alpha``: it scales no update. 0 trains the factors
            alone; a schedule sets it with :func:`lowrank_ft.nn.set_alpha`, and ``save_pretrained`` stores where it is.
        init_weights: True starts from the truncated SVD of ``W``, False from random factors.
        fan_in_fan_out: whether weights are stored ``(in, out)``. Found out from the model; there is no need to set it.
        layers_to_transform: index or indices of the blocks to adapt.
        layers_pattern: name of the list of blocks, where ``layers_to_transform`` needs it.
        modules_to_save: modules that are trained whole and saved with the adapter.
        bias: train the dense biases, too: ``none``, ``all``, or ``lowrank_only`` (those of adapted linears).
    """

    r: int | float = field(default=64, metadata={"help": "Rank (int), or fraction of full rank (float in (0, 1])."})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of the linears to factorize."}
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, suffixes or a regular expression of linears to leave alone."}
    )
    rank_pattern: dict[str, int | float] = field(
        default_factory=dict, metadata={"help": "Name or regular expression to rank, where it differs from r."}
    )
    guide: str = field(default="residual", metadata={"help": "Dense branch: residual or none."})
    alpha: float = field(default=0.0, metadata={"help": "Share of the guide, 0 to 1; not lora_alpha."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the truncated SVD (True) or at random."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Weights are stored (in, out); set automatically."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of blocks to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of blocks."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved whole."})
    bias: str = field(default="none", metadata={"help": "Biases to train: none, all or lowrank_only."})

    weights_may_follow = False  # without an annotation, so it is no field and is never saved; see from_pretrained

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_TYPE]
        # JSON has no sets, and PEFT looks names up in them once per module.
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = self.rank_pattern or {}
        self._check_guide()
        require_choice("bias", self.bias, BIASES)
        self._check_layers()

    def _check_guide(self) -> None:
        if self.guide == "dense":
            raise ConfigError(
                "guide 'dense' trains W, and a PEFT adapter does not store W; use guide 'residual' or 'none' here, "
                "or train with lowrank_ft.training or recipes/finetune.py, which offer the dense guide"
            )
        require_choice("guide", self.guide, PEFT_GUIDES)
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"alpha is {self.alpha}; it is the share of the guide and must be between 0 and 1")
        if self.guide == "none" and self.alpha > 0:
            raise ConfigError(f"alpha is {self.alpha} with guide 'none'; set alpha to 0, or guide to residual")

    def _check_layers(self) -> None:
        # PEFT ignores both silently where they cannot apply.
        if isinstance(self.target_modules, str):
            for option in ("layers_to_transform", "layers_pattern"):
                if getattr(self, option) is not None:
                    raise ConfigError(
                        f"`{option}` cannot be used when `target_modules` is a str (found {self.target_modules!r}); "
                        "give a list of names, or put the layers into the regular expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified; add it"
            )

    @classmethod
    def from_plan(cls, plan: Plan, **options: Any) -> "LowRankConfig":
        """The options that give every linear the rank that it has in ``plan``; what stays dense there is no target.

        Args:
            plan: from :func:`lowrank_ft.make_plan`, ``Plan.load`` or ``Plan.from_dict``.
            options: further options, such as ``guide`` or ``modules_to_save``.

        Raises:
            ConfigError: the plan factorizes nothing, or an option is what the plan decides.
        """
        stacks = [p.name for p in plan.linears if p.experts and p.rank is not None]
        plan = replace(plan, linears=tuple(p for p in plan.linears if not p.experts))
        if stacks and plan.ranks:
            warnings.warn(
                f"an adapter stands beside linears, so {len(stacks)} stacks of experts of the plan (the first is "
                f"{stacks[0]}) stay dense; lowrank-ft convert factorizes them",
                stacklevel=2,
            )
        if not plan.ranks:
            raise ConfigError("the plan leaves every linear dense; lower its ranks, or train without this method")
        decided = {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        if decided & options.keys():
            raise ConfigError(
                f"a plan says which linears get which rank; leave out {', '.join(decided & options.keys())}"
            )
        common = Counter(plan.ranks.values()).most_common(1)[0][0]
        # Anchored, as PEFT reads a pattern as an expression for the tail of a name.
        others: dict[str, int | float] = {
            f"^{re.escape(name)}": rank for name, rank in plan.ranks.items() if rank != common
        }
        return cls(r=common, rank_pattern=others, target_modules=sorted(plan.ranks), **options)

    def to_plan(self, model: nn.Module) -> Plan:
        """What these options would do to a dense ``model``, which may be on the meta device: ranks, sizes, savings.

        Raises:
            ConfigError: ``layers_to_transform`` is set, which a plan has no word for.
            RankError, TargetError: see :func:`lowrank_ft.make_plan`.
        """
        if self.layers_to_transform is not None:
            raise ConfigError("layers_to_transform has no place in a plan; name the linears in target_modules instead")
        plan = make_plan(
            model,
            rank=self.r,
            rank_pattern=self.rank_pattern,
            target_modules=_as_patterns(self.target_modules),
            exclude_modules=_as_patterns(self.exclude_modules),
            keep_full_rank=True,  # an adapter of any rank is trained
        )
        return replace(plan, linears=tuple(p for p in plan.linears if not p.experts))  # adapters are beside linears

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's. The weights of that adapter most likely follow, so layers then put off the SVD until needed."""
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config.weights_may_follow = True
        return config


def _as_patterns(names: list[str] | set[str] | str | None) -> Patterns | None:
    return sorted(names) if isinstance(names, set | list) else names
