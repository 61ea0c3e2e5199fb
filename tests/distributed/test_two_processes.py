"""Two processes on the CPU, started as the documentation says, against one process at equal global batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lowrank_ft.checkpoints.locks import exclusive
from lowrank_ft.schedule import alpha_at, keeps_guide
from lowrank_ft.training.metrics import read_metrics
from tests.conftest import DEMO_MODEL, ROOT, tiny_llama
from tests.distributed import stochastic_driver

OPTIONS = {
    "model": str(DEMO_MODEL), "param_ratio": 0.5, "block_size": 32, "max_steps": 8, "guided_ratio": 0.5, "eval_steps": 4,
    "save_steps": 4, "logging_steps": 1, "learning_rate": 1e-3, "export_dtype": "float32", "save_total_limit": 9,
}  # fmt: skip


def launch(tmp_path, name, processes, batch, guide, *flags):
    (tmp_path / "plays.txt").write_text("Enter HAMLET. To be, or not to be, that is the question.\n" * 150)
    (tmp_path / "general.txt").write_text("The river rises in the hills and flows south to the sea.\n" * 90)
    config = {
        **OPTIONS,
        "dataset": "plays.txt",
        "output_dir": name,
        "per_device_train_batch_size": batch,
        "guide": guide,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    shape = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else ["--num_processes", "1"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", *shape, "--main_process_port", "0",
        str(ROOT / "recipes" / "finetune.py"), "--config", "run.yaml", *flags,
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return tmp_path / name


def series(folder, key):
    return [e[key] for e in read_metrics(folder / "metrics.jsonl") if key in e]


@pytest.mark.parametrize(
    ("guide", "flags"),
    [("dense", ()), ("residual", ()), ("residual", ("--distill-weight", "0.5", "--distill-dataset", "general.txt"))],
)
def test_two_processes_give_the_losses_of_one(tmp_path, guide, flags):
    """``dense`` is the hard case: at the drop, DDP must forget parameters whose gradients it waits for."""
    one = launch(tmp_path, "one", 1, 4, guide, *flags)
    two = launch(tmp_path, "two", 2, 2, guide, *flags)
    for folder, processes in ((one, 1), (two, 2)):
        start = read_metrics(folder / "metrics.jsonl")[0]
        assert (start["num_processes"], start["global_batch"]) == (processes, 4)
        ranks = {p.name for p in (folder / "checkpoints" / "step-00000004").glob("rng-*")}
        assert ranks == {f"rng-{r}.safetensors" for r in range(processes)}  # each process wrote its own
    assert series(two, "loss") == pytest.approx(series(one, "loss"), rel=2e-4)
    assert series(two, "distill_loss") == pytest.approx(series(one, "distill_loss"), rel=2e-3, abs=1e-5)
    assert len(series(one, "distill_loss")) == (8 if flags else 0)
    assert series(two, "eval_loss") == pytest.approx(series(one, "eval_loss"), rel=2e-4)
    assert series(two, "alpha") == series(one, "alpha")
    weights_one, weights_two = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert weights_one.keys() == weights_two.keys()
    for name in weights_one:
        torch.testing.assert_close(weights_two[name], weights_one[name], atol=2e-3, rtol=2e-2)


def test_all_processes_take_the_ranks_of_the_main_one(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "dense")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.distributed.plan_driver", str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    main, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert set(main.values()) == {6}
    assert other == main


def test_all_processes_stop_where_another_run_uses_the_folder(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.distributed.folder_driver", str(tmp_path),
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with exclusive(tmp_path / ".taken.lock-run", "busy"):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        entry = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert (
            entry["taken"] == "another run is training into taken; wait for it or end it, or name another --output-dir"
        )
        assert entry["free"] == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank-0.json", "rank-1.json"]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    two = launch(tmp_path, "two", 2, 2, "dense")
    expected = series(two, "loss")
    for step in ("step-00000008",):
        (two / "checkpoints" / step / "trainer_state.json").unlink()
    assert json.loads((two / "checkpoints" / "step-00000004" / "trainer_state.json").read_text())["step"] == 4
    launch(tmp_path, "two", 1, 4, "dense", "--resume-from-checkpoint", "auto")
    assert series(two, "loss") == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("guide", ["dense", "residual"])
def test_the_guide_is_really_gone_on_both_processes(tmp_path, guide):
    """Nothing holds a guide's weight after the drop: not the model, the optimizer, DDP or accelerate."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.distributed.guide_memory_driver", str(tmp_path), guide,
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        entry = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert (entry["world"], entry["type"]) == (2, "DistributedDataParallel")
        assert [entry["alive"][str(step)] for step in (3, 4, 8)] == [14, 0, 0]


def test_stochastic_guides_are_the_same_on_two_processes(tmp_path):
    """Trainable guides that are left out of a step get no gradient: DDP must not wait for it, and AdamW must skip them.

    The same run on one process goes through the same driver here.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    stochastic_driver.main(tmp_path / "one", 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        "-m", "tests.distributed.stochastic_driver", str(tmp_path / "two"), "2",
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]

    start = read_metrics(tmp_path / "two" / "run" / "metrics.jsonl")[0]
    guided, seed = stochastic_driver.GUIDED, stochastic_driver.SEED
    assert (start["num_processes"], start["guided_steps"]) == (2, guided)
    assert start["max_steps"] == stochastic_driver.STEPS + start["repeated_steps"] > stochastic_driver.STEPS + 1
    updates = [sum(keeps_guide(seed, k, i, alpha_at(k, guided)) for k in range(guided - 1)) for i in range(14)]
    assert len(set(updates)) > 1
    ranks = [json.loads((tmp_path / "two" / f"rank-{rank}.json").read_text()) for rank in range(2)]
    alone = json.loads((tmp_path / "one" / "rank-0.json").read_text())
    assert alone["updates"] == updates
    for entry in ranks:
        assert (entry["world"], entry["type"]) == (2, "DistributedDataParallel")
        assert entry["updates"] == updates
        assert entry["finds_unused"] == [k < guided - 1 for k in range(start["max_steps"])]  # looked at after the drop
    losses = [series(tmp_path / name / "run", "loss") for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    one, two = (load_file(tmp_path / name / "final.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
