"""A compact model as it is stored becomes one that is trained."""

from torch import nn

from lowrank_ft.checkpoints.format import describe_in_config
from lowrank_ft.nn.forms import unpivot_layers


def unpivot(model: nn.Module) -> int:
    """Make plain balanced factors, the form in which they are trained, of every pivoted layer of ``model``, in place.

    The products stay the same. Call it before the optimizer is made, for the parameters are new ones;
    :func:`lowrank_ft.attach_guides` and the trainer of ``lowrank-ft finetune`` do it themselves.

    Returns:
        How many layers were pivoted.
    """
    count = unpivot_layers(model)
    if count:
        describe_in_config(model)
    return count
