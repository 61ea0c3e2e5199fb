"""A small set of valid inputs of every kind, made by the real commands; the mutants are copies of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lowrank_ft.factorization.plan import make_plan
from tests.conftest import DEMO_MODEL, ROOT, tiny_llama

SHORT = {
    "block_size": 16, "max_steps": 4, "guided_ratio": 0.5, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
    "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "eval_ratio": 0.2,
}  # fmt: skip
CHECKPOINT = "run/checkpoints/step-00000002"


def environment(**more: str) -> dict[str, str]:
    """Offline, on the CPU, with the packages of this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path}
    return {**os.environ, **fixed, "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", **more}


def lowrank_ft(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """One command in a fresh process."""
    command = [sys.executable, "-m", "lowrank_ft_cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def make(folder: Path) -> Path:
    """The folder with the inputs; made once, and whole or not at all."""
    if not folder.is_dir():
        try:
            _the_rest(make_dense(folder))
        except BaseException:
            shutil.rmtree(folder)
            raise
    return folder


def make_dense(folder: Path) -> Path:
    """What needs no command: the dense model, a text, a plan."""
    folder.mkdir(parents=True)
    model = tiny_llama(vocab_size=2048, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    for name, size in (("dense", "5GB"), ("sharded", "150KB")):
        model.save_pretrained(folder / name, max_shard_size=size)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEMO_MODEL / file, folder / name)
    words = "to be or not to be that is the question whether it is nobler in the mind to suffer".split()  # noqa: SIM905
    lines = [{"text": " ".join(words[i % 7 :] * 3) + f" {i}."} for i in range(60)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "plan.json").write_text(json.dumps(make_plan(model, param_ratio=0.5).to_dict()))
    return folder


def _the_rest(folder: Path) -> None:
    import yaml
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from lowrank_ft.integrations.peft import LowRankConfig

    dense, text = folder / "dense", folder / "text.jsonl"
    _done("convert", dense, "--param-ratio", 0.5, "--method", "svd", "--output-dir", folder / "compact", cwd=folder)
    options: dict[str, Any] = {"model": str(folder / "compact"), "dataset": str(text), **SHORT}
    (folder / "run.yaml").write_text(yaml.safe_dump({**options, "rank_pattern": {}}))
    _done("finetune", "--config", folder / "run.yaml", "--output-dir", folder / "run", cwd=folder)
    measured = _done("eval", folder / "run", "--baseline", dense, "--data", text, "--json", cwd=folder)
    (folder / "eval.json").write_text(measured)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(dense), LowRankConfig(r=4))
    model.save_pretrained(folder / "adapter")


def _done(*arguments: object, cwd: Path) -> str:
    done = lowrank_ft(*arguments, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return done.stdout
