"""The PEFT method ``lowrank``: train the factors of a linear beside the weight that they replace.

Importing this package registers the method with PEFT; ``get_peft_model(dense, LowRankConfig(r=512))`` then works as
with any built-in method.
"""

from lowrank_ft.integrations.peft.config import LowRankConfig
from lowrank_ft.integrations.peft.layer import LowRankLayer
from lowrank_ft.integrations.peft.model import LowRankModel
from lowrank_ft.integrations.peft.registration import register

register()

__all__ = ["LowRankConfig", "LowRankLayer", "LowRankModel", "register"]
