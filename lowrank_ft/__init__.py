"""Fine-tune a Hugging Face model into a smaller one.

Importing this package registers the loader of compact checkpoints with transformers and, once PEFT is imported, the
method ``lowrank`` with PEFT. So ``AutoModel.from_pretrained`` and ``get_peft_model`` know them. Importing a submodule that
needs torch alone (``lowrank_ft.factorization.solvers``, ``lowrank_ft.nn``) still pays for that.
The command line's ``--help`` imports none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowrank_ft.checkpoints import loader as _loader
from lowrank_ft.checkpoints.empty import apply_config
from lowrank_ft.conversion import Calibration
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.guides import attach_guides
from lowrank_ft.conversion.unpivot import unpivot
from lowrank_ft.errors import LowRankError
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import Plan, make_plan
from lowrank_ft.integrations.when_imported import when_imported
from lowrank_ft.nn import GuidedLowRankLinear, LowRankLinear, end_guidance, set_alpha, set_gates
from lowrank_ft.nn.replace import merge
from lowrank_ft.pretraining.configs import preset_config
from lowrank_ft.pretraining.initialize import initialize_lowrank

if TYPE_CHECKING:
    from lowrank_ft.conversion.prepare import load_calibration
    from lowrank_ft.integrations.peft import LowRankConfig
    from lowrank_ft.integrations.transformers_trainer.callback import GuidanceCallback, phase_out

_loader.register()
when_imported("peft", lambda: import_module("lowrank_ft.integrations.peft"))  # which registers itself

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "GuidanceCallback",
    "GuidedLowRankLinear",
    "LowRankConfig",
    "LowRankError",
    "LowRankLinear",
    "Plan",
    "apply_config",
    "attach_guides",
    "convert",
    "end_guidance",
    "initialize_lowrank",
    "load_calibration",
    "make_plan",
    "merge",
    "phase_out",
    "preset_config",
    "save_compact",
    "set_alpha",
    "set_gates",
    "unpivot",
]


_LATER = {  # they need PEFT, transformers' Trainer or datasets, which take seconds to import
    "load_calibration": "lowrank_ft.conversion.prepare",
    "LowRankConfig": "lowrank_ft.integrations.peft",
    "GuidanceCallback": "lowrank_ft.integrations.transformers_trainer.callback",
    "phase_out": "lowrank_ft.integrations.transformers_trainer.callback",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
