"""``GuidanceCallback`` in ``transformers.Trainer`` on two processes with DDP, against one at equal global batch."""

from functools import partial

import pytest
import torch

from lowrank_ft import GuidanceCallback
from tests.callback_driver import GUIDED, STEPS, launch, make_model, make_trainer, outcome, saved_weights, series

KINDS = ("dense", "peft-residual")
RESUMED = (GUIDED - 2, GUIDED + 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What both processes wrote of a run: ``runs(kind, "straight")``. One launch does all."""
    output = tmp_path_factory.mktemp("ddp")
    launch(output, KINDS, RESUMED)
    return partial(outcome, output)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_the_same_global_batch(runs, tmp_path, kind):
    """``dense`` is the hard case: DDP waits for the gradients of every parameter that it was made with."""
    one = make_trainer(make_model(kind, 0.0), tmp_path / "one", GuidanceCallback(0.5), save_strategy="no")
    one.train()
    for rank in runs(kind, "straight")[0]:
        assert (rank["world"], rank["type"]) == (2, "DistributedDataParallel")
        assert rank["losses"] == pytest.approx(series(one, "loss"), rel=2e-4)
        assert rank["alphas"] == series(one, "alpha")
        tensors = 14 if kind == "dense" else 28
        assert [rank["alive"][str(step)] for step in (1, GUIDED - 1, GUIDED, STEPS)] == [tensors, tensors, 0, 0]
        assert rank["optimized"] == sum(len(group["params"]) for group in one.optimizer.param_groups)
    # The wrapper that was made anew averages gradients: both processes end with the same weights.
    assert len({rank["checksum"] for rank in runs(kind, "straight")[0]}) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", RESUMED)
def test_two_processes_resume_to_the_same_run(runs, kind, step):
    for found, expected in zip(runs(kind, f"from-{step}")[0], runs(kind, "straight")[0], strict=True):
        assert (found["world"], found["type"]) == (2, "DistributedDataParallel")
        assert (found["losses"], found["checksum"]) == (expected["losses"], expected["checksum"])
        assert min(map(int, found["alive"])) == step + 1
        assert found["alive"][str(STEPS)] == 0
    again, straight = (saved_weights(runs(kind, run)[1] / "final") for run in (f"from-{step}", "straight"))
    assert again.keys() == straight.keys()
    assert all(torch.equal(again[name], straight[name]) for name in straight)
