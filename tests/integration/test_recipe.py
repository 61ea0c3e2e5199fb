"""The recipe and ``lowrank-ft finetune`` as a user starts them, and ``lowrank-ft export`` on what they leave."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft.checkpoints.models import load_model
from lowrank_ft.checkpoints.source import Source
from lowrank_ft.data.examples import pack
from lowrank_ft.errors import ConfigError
from lowrank_ft.nn import guided_layers, lowrank_layers
from lowrank_ft.training import ModelArguments
from lowrank_ft.training.arguments import as_rank, parse_args
from lowrank_ft.training.metrics import read_metrics
from tests.conftest import DEMO_MODEL, ROOT

SHORT = {
    "block_size": 32, "max_steps": 6, "guided_ratio": 0.5, "per_device_train_batch_size": 2, "learning_rate": "1e-3",
    "eval_steps": 3, "save_steps": 2, "logging_steps": 1,
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    (tmp_path / "plays.txt").write_text("Enter HAMLET. To be, or not to be, that is the question.\n" * 120)
    return tmp_path / "plays.txt"


def write_config(tmp_path, **options):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**SHORT, **options}))
    return str(path)


def test_convert_finetune_export_in_three_commands(cli, text, tmp_path):
    compact, tuned = tmp_path / "compact", tmp_path / "tuned"
    cli("convert", DEMO_MODEL, "--param-ratio", "0.5", "--method", "svd", "--output-dir", compact)
    config = write_config(tmp_path, model=str(compact), dataset=str(text), output_dir=str(tuned))
    done = cli("finetune", "--config", config, "--seed", "3", "--", "--num_processes", "1", ACCELERATE_USE_CPU="true")
    assert done.stdout.splitlines()[-1] == str(tuned)
    assert "values were not passed" not in done.stderr

    dense, start = (AutoModelForCausalLM.from_pretrained(p) for p in (DEMO_MODEL, compact))
    model = AutoModelForCausalLM.from_pretrained(tuned)
    assert model.num_parameters() == start.num_parameters() < dense.num_parameters()
    assert model.dtype == torch.bfloat16  # that of the checkpoint, though it was trained in float32
    assert model.config.quantization_config.base_model == str(DEMO_MODEL)
    prompt = AutoTokenizer.from_pretrained(tuned)("Enter HAMLET.", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    entries = [e for e in read_metrics(tuned / "metrics.jsonl") if "loss" in e]
    assert [e["alpha"] > 0 for e in entries] == [True] * 3 + [False] * 3
    card = (tuned / "README.md").read_text()
    assert "recipes/finetune.py" in card
    assert "held-out loss" in card

    checkpoint = tuned / "checkpoints" / "step-00000006"
    cli("export", checkpoint, "--output-dir", tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert {n: layer.rank for n, layer in lowrank_layers(exported)} == {n: m.rank for n, m in lowrank_layers(model)}
    AutoTokenizer.from_pretrained(tmp_path / "exported")


def test_a_dense_model_without_a_guide_and_a_guided_checkpoint(python, cli, text, tmp_path):
    tuned = tmp_path / "tuned"
    recipe = str(ROOT / "recipes" / "finetune.py")
    config = write_config(tmp_path, model=str(DEMO_MODEL), param_ratio=0.5, dataset=str(text), output_dir=str(tuned))
    has_bitsandbytes = find_spec("bitsandbytes") is not None
    packed = ["--guide-bits", "4", "--optim", "adamw_8bit"] if has_bitsandbytes else []
    flags = ["--guided-ratio", "1.0", "--rank-pattern", "{q_proj: 8}", "--trainable", "lora", "--lora-r", "4", *packed]
    python(recipe, "--config", config, *flags)
    tensors = load_file(tuned / "checkpoints" / "step-00000004" / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.guide.weight"].dtype == (
        torch.uint8 if has_bitsandbytes else torch.float32
    )
    assert "model.layers.0.mlp.up_proj.U.lora_A.default.weight" in tensors
    cli("export", tuned / "checkpoints" / "step-00000004", "--output-dir", tmp_path / "exported", "--dtype", "float32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert dict(lowrank_layers(model))["model.layers.0.self_attn.q_proj"].rank == 8
    assert model.dtype == torch.float32
    assert not any("guide" in n or "lora" in n for n, _ in model.named_parameters())


def test_the_checkpoint_of_a_killed_run_exports_whole(python, cli, text, tmp_path):
    tuned = tmp_path / "tuned"
    config = write_config(tmp_path, model=str(DEMO_MODEL), param_ratio=0.5, dataset=str(text), output_dir=str(tuned))
    code = (
        "import os, runpy, signal, sys; from lowrank_ft.training import trainer\n"
        "end = trainer.Trainer._end_guidance\n"
        "trainer.Trainer._end_guidance = lambda self: (self._save(), os.kill(os.getpid(), signal.SIGKILL))\n"
        f"sys.argv = ['finetune.py', '--config', {config!r}]\n"
        f"runpy.run_path({str(ROOT / 'recipes' / 'finetune.py')!r}, run_name='__main__')"
    )
    assert python("-c", code, check=False).returncode == -signal.SIGKILL
    assert not (tuned / "config.json").exists()
    cli("export", tuned / "checkpoints" / "step-00000003", "--output-dir", tmp_path / "exported")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == torch.bfloat16
    AutoTokenizer.from_pretrained(tmp_path / "exported")


def test_stopping_finetune_stops_the_training(text, tmp_path):
    """SIGTERM to the command reaches the process that trains."""
    tuned = tmp_path / "tuned"
    config = write_config(
        tmp_path, model=str(DEMO_MODEL), param_ratio=0.5, dataset=str(text), output_dir=str(tuned), max_steps=100_000,
        eval_steps=0,
    )  # fmt: skip
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lowrank_ft_cli.main", "finetune", "--config", config]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, cwd=tmp_path)
    metrics = tuned / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while len(read_metrics(metrics)) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted; if it had --save-steps, resume it with --resume-from-checkpoint auto" in err
    lines = len(read_metrics(metrics))
    time.sleep(2)
    assert len(read_metrics(metrics)) == lines


def test_the_recipe_reports_errors_in_one_line(python, tmp_path):
    recipe = str(ROOT / "recipes" / "finetune.py")
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": "x"}) + "\n")
    cases = [
        (
            ["--model", str(DEMO_MODEL), "--rank", "8", "--dataset", "x.jsonl"],
            "no column 'text' and no column 'messages'",
        ),
        (["--model", str(DEMO_MODEL), "--rank", "8"], "no dataset is named"),
        ([], "no model is named"),
        (
            ["--model", str(DEMO_MODEL), "--rank", "8", "--dataset", "x.jsonl", "--block-size", "4096"],
            "exceeds the 512",
        ),
    ]
    for flags, message in cases:
        done = python(recipe, *flags, check=False)
        assert done.returncode == 1
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert message in errors[0]
        assert "Traceback" not in done.stderr


def test_yaml_and_flags(tmp_path):
    config = write_config(tmp_path, model="m", rank=64, target_modules=["q_proj"], rank_pattern={"q": 4})
    model, data, train = parse_args(["--config", config, "--max-steps", "9", "--block-size", "16"])
    assert (as_rank(model.rank), model.target_modules, model.rank_pattern) == (64, ["q_proj"], {"q": 4})
    assert (data.block_size, train.max_steps, train.learning_rate) == (16, 9, 1e-3)
    assert as_rank(0.5) == 0.5
    assert [(as_rank(t), type(as_rank(t))) for t in ("64", "0.5", "1.0")] == [(64, int), (0.5, float), (1.0, float)]
    assert as_rank(None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lerning_rate": 1}, "there is no option 'lerning_rate'; did you mean learning_rate"),
        ({"guide": "teacher"}, "guide 'teacher' is unknown; choose one of residual, dense, none, auto"),
        ({"eval_ratio": 2}, "eval_ratio is 2"),
        ({"distill_weight": 2}, "distill_weight is 2; it must be 0 to 1"),
        ({"distill_temperature": 0}, "distill_temperature is 0; it must be above 0"),
        ({"distill_dataset": "a.txt"}, "distill_dataset a.txt is named, and distill_weight 0 would not use it"),
        ({"guide": "dense", "guide_bits": 4}, "a dense guide is trained, which takes its full precision"),
        ({"guide_bits": 8}, "guide_bits is 8; it must be 4, or left out"),
        ({"guide": "dense", "trainable": "lora"}, "trainable is lora, and a dense guide is trained in full"),
        ({"optim": "sgd"}, "optim 'sgd' is unknown"),
        ({"lora_r": 0}, "lora_r is 0; it must be 1 to 65536"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_args(["--config", write_config(tmp_path, model="m", **options)])


def test_unreadable_configs(tmp_path):
    with pytest.raises(ConfigError, match="cannot read --config"):
        parse_args(["--config", str(tmp_path / "none.yaml")])
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="no valid YAML"):
        parse_args(["--config", str(tmp_path / "bad.yaml")])


CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    if path.name == "fsdp2.yaml":  # one for accelerate, which tests/distributed launches
        from accelerate.commands.config.config_args import load_config_from_file

        assert load_config_from_file(str(path)).fsdp_config["fsdp_version"] == 2
    else:
        parse_args(["--config", str(path), "--model", "m"])


def test_the_teacher_is_the_dense_model_and_a_copy(tmp_path):
    """From a dense model, from a compact checkpoint with and without a guide, and not at all."""
    from recipes.finetune import prepare_model

    train_data = pack(np.arange(2048, dtype=np.int32) % 500, 64)
    dense = load_model(Source(str(DEMO_MODEL)), torch.float32)
    lowrank_ft.save_compact(converted(dense), tmp_path / "compact", base_model=str(DEMO_MODEL))
    for name, options in (
        (str(DEMO_MODEL), {"param_ratio": 0.5}),
        (str(DEMO_MODEL), {"param_ratio": 0.5, "guide_model": str(DEMO_MODEL)}),
        (str(tmp_path / "compact"), {}),
        (str(tmp_path / "compact"), {"guide": "none"}),
    ):
        args = ModelArguments(model=name, **options)
        model, base_model, teacher = prepare_model(args, Source(name), train_data, distill=True)
        assert base_model == str(DEMO_MODEL)
        assert any(lowrank_layers(model))
        expected = load_model(Source(str(DEMO_MODEL)), torch.float32).state_dict()
        found = teacher.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], v) for k, v in found.items())
        assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in teacher.parameters())
        assert prepare_model(args, Source(name), train_data)[2] is None

    dense.save_pretrained(tmp_path / "other")
    options = {"model": str(tmp_path / "compact"), "guide": "none", "guide_model": str(tmp_path / "other")}
    _, base_model, teacher = prepare_model(
        ModelArguments(**options), Source(options["model"]), train_data, distill=True
    )
    assert (base_model, teacher.config._name_or_path) == (str(DEMO_MODEL), options["guide_model"])

    lowrank_ft.save_compact(converted(dense), tmp_path / "orphan", base_model="")
    args = ModelArguments(model=str(tmp_path / "orphan"), guide="none")
    with pytest.raises(ConfigError, match=r"does not say which dense model .* --guide none --distill-weight 0"):
        prepare_model(args, Source(args.model), train_data, distill=True)


@pytest.mark.parametrize(("ratio", "kind"), [(0.6, "residual"), (0.3, None)])
def test_auto_guides_what_keeps_half_of_its_parameters(tmp_path, ratio, kind):
    """Whether the recipe converts, or finds a checkpoint; and one that does not know its origin goes without."""
    from recipes.finetune import prepare_model

    train_data = pack(np.arange(2048, dtype=np.int32) % 500, 64)
    dense = load_model(Source(str(DEMO_MODEL)), torch.float32)
    for folder, base_model in (("compact", str(DEMO_MODEL)), ("orphan", "")):
        lowrank_ft.save_compact(converted(dense, ratio), tmp_path / folder, base_model=base_model)
    for options, expected in (
        ({"model": str(DEMO_MODEL), "param_ratio": ratio, "method": "svd"}, kind),
        ({"model": str(tmp_path / "compact")}, kind),
        ({"model": str(tmp_path / "compact"), "guide": "dense"}, "dense"),
        ({"model": str(tmp_path / "orphan")}, None),
    ):
        args = ModelArguments(**options)
        model, _, _ = prepare_model(args, Source(args.model), train_data)
        assert {layer.kind for _, layer in guided_layers(model)} == ({expected} if expected else set())


def converted(dense, ratio=0.5):
    model = copy.deepcopy(dense)
    lowrank_ft.convert(model, param_ratio=ratio)
    return model
