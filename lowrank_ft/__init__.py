"""Fine-tune a Hugging Face model into a smaller one.

Importing this package registers the loader of compact checkpoints with transformers and the method ``lowrank`` with
PEFT, so ``AutoModel.from_pretrained`` and ``get_peft_model`` know them. Importing a submodule that needs torch alone
(``lowrank_ft.solvers``, ``lowrank_ft.nn``) still pays for that; the command line's ``--help`` does not import any of it.
"""

from typing import TYPE_CHECKING, Any

from lowrank_ft.calibration import Calibration
from lowrank_ft.conversion import attach_guides, convert, merge
from lowrank_ft.errors import LowRankError
from lowrank_ft.from_scratch import initialize_lowrank
from lowrank_ft.hub import loader as _loader
from lowrank_ft.hub.configs import preset_config
from lowrank_ft.hub.export import save_compact
from lowrank_ft.nn import GuidedLowRankLinear, LowRankLinear, end_guidance, set_alpha, set_gates
from lowrank_ft.peft_method import LowRankConfig  # registers the method with PEFT
from lowrank_ft.plan import Plan, make_plan

if TYPE_CHECKING:
    from lowrank_ft.training.callback import GuidanceCallback

_loader.register()

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "GuidanceCallback",
    "GuidedLowRankLinear",
    "LowRankConfig",
    "LowRankError",
    "LowRankLinear",
    "Plan",
    "attach_guides",
    "convert",
    "end_guidance",
    "initialize_lowrank",
    "make_plan",
    "merge",
    "preset_config",
    "save_compact",
    "set_alpha",
    "set_gates",
]


def __getattr__(name: str) -> Any:
    if name == "GuidanceCallback":  # it needs transformers' Trainer, which takes seconds to import
        from lowrank_ft.training.callback import GuidanceCallback

        return GuidanceCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
