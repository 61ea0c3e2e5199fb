"""Killed with SIGKILL before, at and after the end of guidance; resumed to the same weights, bit for bit."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank_ft.training.metrics import read_metrics
from lowrank_ft.training.resume import find_checkpoints
from tests.conftest import ROOT, Run
from tests.training_driver import GUIDED, STEPS

GUIDES = ("dense", "residual", "distilled", "packed", "stochastic")


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[str, Path]:
    """Folders of runs that nobody killed, by guide."""
    return {guide: tmp_path_factory.mktemp(guide) / "run" for guide in GUIDES}


def drive(python: Run, folder: Path, guide: str, *flags: str, check: bool = True):
    return python("-m", "tests.training_driver", str(folder), guide, *flags, check=check, PYTHONPATH=str(ROOT))


def losses(folder: Path) -> list[tuple[int, float]]:
    return [
        (e["step"], e.get("loss", e.get("eval_loss"))) for e in read_metrics(folder / "metrics.jsonl") if len(e) > 2
    ]


@pytest.mark.parametrize(
    ("guide", "flag", "step"),
    [
        ("dense", "--kill-at", GUIDED - 3),  # before the end of guidance: W and its moments come back
        ("dense", "--kill-at", GUIDED),  # at its end
        ("dense", "--kill-at", GUIDED + 3),  # after it: the model has to be shaped before weights are read
        ("dense", "--kill-in-save", GUIDED),  # halfway through writing the checkpoint of the drop
        ("residual", "--kill-at", GUIDED - 1),
        ("distilled", "--kill-at", GUIDED + 1),  # two streams of data have to go on where they were
        ("packed", "--kill-at", GUIDED - 1),  # packed guides, and moments in 8 bits, come back
        ("stochastic", "--kill-at", GUIDED - 3),  # the gates of the steps to come are those of the run that was killed
        ("stochastic", "--kill-at", STEPS + 1),  # amid the repeated data
    ],
)
def test_killed_and_resumed_is_the_same_run(straight, python, tmp_path, guide, flag, step):
    if guide == "packed":
        pytest.importorskip("bitsandbytes")
    if not straight[guide].exists():
        drive(python, straight[guide], guide)
    folder = tmp_path / "run"
    done = drive(python, folder, guide, flag, str(step), check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "final.safetensors").exists()
    last = step - 1 if flag == "--kill-in-save" else step
    assert find_checkpoints(folder)[-1].name == f"step-{last:08d}"

    if guide == "packed":
        stored = load_file(find_checkpoints(folder)[-1] / "model.safetensors")
        assert stored["model.layers.0.mlp.up_proj.guide.weight"].dtype == torch.uint8
        stored = load_file(find_checkpoints(folder)[-1] / "optimizer.safetensors")
        assert stored["state1.lm_head.weight"].dtype == torch.uint8

    drive(python, folder, guide, "--resume")
    expected, found = load_file(straight[guide] / "final.safetensors"), load_file(folder / "final.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert losses(folder) == losses(straight[guide])
    last = max(s for s, _ in losses(folder))
    assert last > STEPS + 1 if guide == "stochastic" else last == STEPS
    assert not any(".guide." in name for name in found)
