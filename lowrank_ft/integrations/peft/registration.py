"""Make PEFT know the method ``lowrank``."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from lowrank_ft.integrations.peft.config import PEFT_TYPE, LowRankConfig
from lowrank_ft.integrations.peft.model import LowRankModel


def register() -> None:
    """Add the method to PEFT's tables; calling it again changes nothing."""
    _extend_peft_type()
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=PEFT_TYPE.lower(), config_cls=LowRankConfig, model_cls=LowRankModel)


def _extend_peft_type() -> None:
    """Add a member to PEFT's enum of methods, which has no way to do so: an Enum is closed once its class exists.

    These are the attributes that Python's own ``enum`` sets on a member and on its class (3.10 to 3.14).
    """
    if PEFT_TYPE in PeftType.__members__:
        return
    member: Any = str.__new__(PeftType, PEFT_TYPE)
    member._name_ = member._value_ = PEFT_TYPE
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType)
    PeftType._member_names_.append(PEFT_TYPE)
    PeftType._member_map_[PEFT_TYPE] = member
    PeftType._value2member_map_[PEFT_TYPE] = member
    type.__setattr__(PeftType, PEFT_TYPE, member)
