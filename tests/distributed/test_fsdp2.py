"""FSDP2 on two CPU processes, against one process at equal global batch: losses, memory, traffic, checkpoints.

accelerate ignores FSDP on the CPU, so each run says what it ran on: two processes, and a DTensor for every parameter.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lowrank_ft.checkpoints import sharded as tensor_files
from lowrank_ft.errors import CheckpointError, TrainingStateError
from lowrank_ft.training.metrics import read_metrics
from lowrank_ft.training.resume import read_state
from tests.conftest import ROOT
from tests.distributed import fsdp2_driver
from tests.distributed.fsdp2_driver import ACCUMULATION, GUIDED, STEPS

GUIDES = ("residual", "dense")
EARLY, LATE = "checkpoints/step-00000002", "checkpoints/step-00000004"  # GUIDED is between them
SAVING = {"save_steps": 2, "eval_steps": 3, "save_total_limit": 9}
KINDS = {
    **{guide: (guide, SAVING) for guide in GUIDES},
    "tied": ("residual", {"tie": True, "eval_steps": 2, "load_best_model_at_end": True, "gradient_checkpointing": True}),
    "distilled": ("residual", {"tie": True, "distill_weight": 0.5, "max_grad_norm": 0.2}),
    "bf16": ("residual", {"mixed_precision": "bf16", "max_steps": 2}),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every kind on one process and on two, and runs that go on, on two, from what one or two have saved."""
    folder = tmp_path_factory.mktemp("fsdp2")
    for name, (guide, options) in KINDS.items():
        fsdp2_driver.train(folder / f"one-{name}", guide, 1, options)
    AcceleratorState._reset_state(reset_partial_state=True)
    plan = [{"name": f"two-{n}", "guide": guide, "options": options} for n, (guide, options) in KINDS.items()]
    plan += [
        {"name": f"{source}-to-two-{when}", "guide": "dense",
         "options": {"eval_steps": 3, "resume_from_checkpoint": str(folder / f"{source}-dense" / at)}}
        for source in ("one", "two") for when, at in (("early", EARLY), ("late", LATE))
    ]  # fmt: skip
    (folder / "runs.json").write_text(json.dumps(plan))
    env = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed.fsdp2_driver", str(folder / "runs.json")],
        capture_output=True, text=True, cwd=ROOT, env=env, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def watched(runs, name, rank=0):
    return json.loads((runs / name / f"watched-{rank}.json").read_text())


def at_step(runs, name, step, rank=0):
    return next(s for s in watched(runs, name, rank)["seen"] if s["step"] == step)


def series(folder, key):
    return [e[key] for e in read_metrics(folder / "metrics.jsonl") if key in e]


@pytest.mark.parametrize("kind", KINDS)
def test_it_ran_sharded_on_two_processes(runs, kind):
    for rank in range(2):
        facts = watched(runs, f"two-{kind}", rank)
        assert (facts["world"], facts["type"]) == (2, "FSDP")
        assert all(s["sharded"] == s["of"] > 0 for s in facts["seen"])
    assert watched(runs, f"one-{kind}")["world"] == 1
    start = read_metrics(runs / f"two-{kind}" / "metrics.jsonl")[0]
    assert (start["parallelism"], start["num_processes"]) == ("fsdp2", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_losses_of_one(runs, kind):
    """With gradient accumulation, clipping (the norm is above the limit), and uneven shares of the evaluation."""
    one, two = runs / f"one-{kind}", runs / f"two-{kind}"
    close = {"rel": 2e-2} if kind == "bf16" else {"rel": 2e-4}
    assert len(series(one, "loss")) == (2 if kind == "bf16" else STEPS)
    for key in ("loss", "eval_loss", "grad_norm"):
        assert series(two, key) == pytest.approx(series(one, key), **close)
    assert min(series(one, "grad_norm")) > KINDS[kind][1].get("max_grad_norm", 0.5)
    assert watched(runs, f"two-{kind}")["best_step"] == watched(runs, f"one-{kind}")["best_step"]


def test_the_teacher_is_sharded_too_and_teaches_the_same(runs):
    for step in range(1, STEPS + 1):
        (first, of), (second, _) = (at_step(runs, "two-distilled", step, rank)["teacher"] for rank in range(2))
        assert first + second == of  # after a forward pass nothing stays gathered, embeddings neither
    found = series(runs / "two-distilled", "distill_loss")
    assert found == pytest.approx(series(runs / "one-distilled", "distill_loss"), rel=2e-4)
    assert len(found) == STEPS
    assert min(found) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_main_process_gets_the_whole_model_and_the_other_none(runs, kind):
    one, two = (load_file(runs / f"{n}-{kind}" / "final.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    tolerance = {"atol": 2e-2, "rtol": 0.1} if kind == "bf16" else {"atol": 2e-3, "rtol": 2e-2}
    for name in one:
        torch.testing.assert_close(two[name], one[name], **tolerance)
    assert [watched(runs, f"two-{kind}", rank)["returned"] for rank in range(2)] == [["cpu"], ["meta"]]


@pytest.mark.parametrize("guide", GUIDES)
def test_at_the_drop_memory_and_traffic_really_fall(runs, guide):
    for rank in range(2):
        facts = watched(runs, f"two-{guide}", rank)
        # Steps 2 and 5 do the same but for the guide: no evaluation, no first-time allocation.
        before, after = at_step(runs, f"two-{guide}", GUIDED - 1, rank), at_step(runs, f"two-{guide}", GUIDED + 2, rank)
        half = facts["guide_bytes"] // 2  # this process's part
        states = 2 if guide == "dense" else 0  # AdamW's two moments
        assert before["parameters"] - after["parameters"] == half
        freed = before["optimizer"] - after["optimizer"]
        assert 0 <= freed - states * half < 100  # and one step counter per guide, of 4 bytes
        assert before["live"] - after["live"] >= (1 + states) * half
        # Each guide was gathered in each forward pass and in each backward pass.
        assert before["gathered"] - after["gathered"] == 2 * ACCUMULATION * facts["guide_bytes"]
        assert after["gathered"] > 0
        assert facts["drop_changed"] == []  # the state of U, V and the rest


@pytest.mark.parametrize("when", ["early", "late"])
def test_resuming_on_as_many_processes_is_exact(runs, when):
    """Before and after the drop, bit for bit."""
    whole, resumed = (load_file(runs / n / "final.safetensors") for n in ("two-dense", f"two-to-two-{when}"))
    assert (
        series(runs / f"two-to-two-{when}", "loss") == series(runs / "two-dense", "loss")[2 if when == "early" else 4 :]
    )
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


@pytest.mark.parametrize("when", ["early", "late"])
def test_two_processes_go_on_from_one(runs, when):
    losses = series(runs / f"one-to-two-{when}", "loss")
    assert losses == pytest.approx(series(runs / "one-dense", "loss")[-len(losses) :], rel=2e-4)
    assert len(losses) == STEPS - (2 if when == "early" else 4)
    assert watched(runs, f"one-to-two-{when}")["type"] == "FSDP"


@pytest.mark.parametrize(("at", "left"), [(EARLY, 4), (LATE, 2)])
def test_one_process_goes_on_from_two(runs, tmp_path, at, left):
    options = {"eval_steps": 3, "resume_from_checkpoint": str(runs / "two-dense" / at)}
    fsdp2_driver.train(tmp_path / "run", "dense", 1, options)
    assert series(tmp_path / "run", "loss") == pytest.approx(series(runs / "two-dense", "loss")[-left:], rel=2e-4)


@pytest.mark.parametrize("at", [EARLY, LATE])
def test_a_sharded_checkpoint_holds_what_a_whole_one_does(runs, at):
    assert read_state(runs / "two-dense" / at).guided is (at == EARLY)
    for name in ("model", "optimizer"):
        one, two = (tensor_files.read(runs / f"{n}-dense" / at, name) for n in ("one", "two"))
        assert {k: v.shape for k, v in one.items()} == {k: v.shape for k, v in two.items()}
        assert any(".guide." in k for k in two) is (at == EARLY)
    config = json.loads((runs / "two-dense" / at / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]  # not the class that sharding made of it
    assert not [
        p for p in (runs / "two-dense" / at).rglob("*") if p.is_file() and p.suffix not in (".safetensors", ".json")
    ]


def test_a_lost_shard_and_another_phase_are_errors(runs, tmp_path):
    broken = tmp_path / "step-00000002"
    shutil.copytree(runs / "two-dense" / EARLY, broken)
    (shard, _) = sorted((broken / "model-shards").iterdir())
    shard.unlink()
    options = {"eval_steps": 3, "resume_from_checkpoint": str(broken)}
    with pytest.raises(CheckpointError, match="a shard is missing"):
        fsdp2_driver.train(tmp_path / "run", "dense", 1, options)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(TrainingStateError, match="other settings: guides"):
        fsdp2_driver.train(
            tmp_path / "run", "residual", 1, {**options, "resume_from_checkpoint": str(runs / "two-dense" / EARLY)}
        )
