"""Fine-tune a Hugging Face model into a smaller one.

Importing this package makes the loader of compact checkpoints known to transformers, and the method ``lowrank`` to PEFT.
So ``AutoModel.from_pretrained`` and ``get_peft_model`` know them, whichever package is imported first. It imports neither
of the two, nor torch: each name of the list below brings what it needs when it is first used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lowrank_ft.when_imported import when_imported

if TYPE_CHECKING:
    from lowrank_ft.checkpoints.empty import apply_config
    from lowrank_ft.conversion.calibration import Calibration
    from lowrank_ft.conversion.convert import convert
    from lowrank_ft.conversion.guides import attach_guides
    from lowrank_ft.conversion.prepare import load_calibration
    from lowrank_ft.conversion.unpivot import unpivot
    from lowrank_ft.errors import LowRankError
    from lowrank_ft.export import save_compact
    from lowrank_ft.factorization.plan import Plan, make_plan
    from lowrank_ft.integrations.peft import LowRankConfig
    from lowrank_ft.integrations.transformers_trainer.callback import GuidanceCallback, phase_out
    from lowrank_ft.nn import GuidedLowRankLinear, LowRankLinear, end_guidance, set_alpha, set_gates
    from lowrank_ft.nn.replace import merge
    from lowrank_ft.pretraining.configs import preset_config
    from lowrank_ft.pretraining.initialize import initialize_lowrank

# Both modules register themselves at their end.
when_imported("transformers.modeling_utils", lambda: import_module("lowrank_ft.checkpoints.loader"))
when_imported("peft", lambda: import_module("lowrank_ft.integrations.peft"))

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

_HOME = {
    "Calibration": "conversion.calibration",
    "GuidanceCallback": "integrations.transformers_trainer.callback",
    "GuidedLowRankLinear": "nn",
    "LowRankConfig": "integrations.peft",
    "LowRankError": "errors",
    "LowRankLinear": "nn",
    "Plan": "factorization.plan",
    "apply_config": "checkpoints.empty",
    "attach_guides": "conversion.guides",
    "convert": "conversion.convert",
    "end_guidance": "nn",
    "initialize_lowrank": "pretraining.initialize",
    "load_calibration": "conversion.prepare",
    "make_plan": "factorization.plan",
    "merge": "nn.replace",
    "phase_out": "integrations.transformers_trainer.callback",
    "preset_config": "pretraining.configs",
    "save_compact": "export",
    "set_alpha": "nn",
    "set_gates": "nn",
    "unpivot": "conversion.unpivot",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
