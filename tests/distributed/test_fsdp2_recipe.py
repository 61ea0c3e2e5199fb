"""The documented launch line of FSDP2, with accelerate's configuration file, on two CPU processes."""

import os
import subprocess
import sys

import torch
import yaml
from safetensors.torch import load_file

from lowrank_ft.checkpoints.from_training import load_training_checkpoint
from lowrank_ft.nn.forms import stored_as
from lowrank_ft.training.metrics import read_metrics
from tests.conftest import DEMO_MODEL, ROOT


def test_the_recipe_exports_the_whole_model_and_export_takes_its_shards(tmp_path):
    (tmp_path / "plays.txt").write_text("Enter HAMLET. To be, or not to be, that is the question.\n" * 100)
    config = {
        "model": str(DEMO_MODEL), "param_ratio": 0.5, "method": "svd", "allocation": "uniform", "block_size": 32,
        "dataset": "plays.txt", "output_dir": "run", "guide": "residual", "max_steps": 3, "guided_ratio": 0.67,
        "save_steps": 1, "save_total_limit": 9, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "export_dtype": "float32", "load_best_model_at_end": False,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/configs/fsdp2.yaml"),
        "--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0",
        str(ROOT / "recipes" / "finetune.py"), "--config", "run.yaml",
    ]  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "run"
    start = read_metrics(run / "metrics.jsonl")[0]
    assert (start["parallelism"], start["num_processes"], start["guided_steps"]) == ("fsdp2", 2, 2)

    exported = load_file(run / "model.safetensors")
    steps = {}
    for step in (1, 3):  # with and without guides
        folder = run / "checkpoints" / f"step-{step:08d}"
        assert len(list((folder / "model-shards").iterdir())) == 2
        model, base, _ = load_training_checkpoint(folder)
        assert base == str(DEMO_MODEL)
        with stored_as(model, "pivoted"):
            steps[step] = model.state_dict()
    assert {k for k in exported if ".guide." in k} == set()
    for name, tensor in exported.items():
        assert torch.equal(tensor, steps[3][name]), name
    name = next(k for k in exported if k.endswith(".U.weight"))
    assert not torch.equal(steps[1][name], steps[3][name])  # it did train
