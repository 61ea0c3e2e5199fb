"""``GuidanceCallback`` in ``transformers.Trainer`` on two processes with DDP, against one at equal global batch."""

import json
import os
import subprocess
import sys

import pytest

from tests.callback_driver import GUIDED, STEPS, make_model, make_trainer, series
from tests.conftest import ROOT


def launch(output, *arguments):
    """The driver on two processes; what each wrote, by run."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.callback_driver", str(output), *arguments,
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, capture_output=True, text=True, cwd=output, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda run: [json.loads((output / f"{run}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["dense", "peft-residual"])
def test_two_processes_are_one_with_the_same_global_batch(tmp_path, kind):
    """``dense`` is the hard case: DDP waits for the gradients of every parameter that it was made with."""
    from lowrank_ft import GuidanceCallback

    one = make_trainer(make_model(kind, 0.0), tmp_path / "one", GuidanceCallback(0.5), save_strategy="no")
    one.train()
    resumed = [GUIDED - 2, GUIDED + 2] if kind == "dense" else []
    runs = launch(tmp_path, kind, "--batch", "1", "--dropout", "0", "--resume", *map(str, resumed))
    for rank in runs("straight"):
        assert (rank["world"], rank["type"]) == (2, "DistributedDataParallel")
        assert rank["losses"] == pytest.approx(series(one, "loss"), rel=2e-4)
        assert rank["alphas"] == series(one, "alpha")
        tensors = 14 if kind == "dense" else 28
        assert [rank["alive"][str(step)] for step in (1, GUIDED - 1, GUIDED, STEPS)] == [tensors, tensors, 0, 0]
        assert rank["optimized"] == sum(len(group["params"]) for group in one.optimizer.param_groups)
    # Gradients are still averaged by the wrapper that was made anew: both processes hold the same weights.
    assert len({rank["checksum"] for rank in runs("straight")}) == 1
    for step in resumed:
        for rank, expected in zip(runs(f"from-{step}"), runs("straight"), strict=True):
            assert rank["type"] == "DistributedDataParallel"
            assert (rank["losses"], rank["checksum"]) == (expected["losses"], expected["checksum"])
            assert rank["alive"][str(STEPS)] == 0
