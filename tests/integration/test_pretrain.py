"""``lowrank-ft pretrain`` as a user starts it: from token files to a checkpoint that loads, resumed, and refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_ft.checkpoints.locks import exclusive
from lowrank_ft.errors import ConfigError
from lowrank_ft.nn import lowrank_layers
from lowrank_ft.pretraining.options import PretrainArguments, ScratchArguments
from lowrank_ft.training.arguments import parse_groups
from lowrank_ft.training.metrics import read_metrics
from tests.conftest import DEMO_MODEL

SMALL = "{hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4, sequence_length: 64}"
FLAGS = ("--preset", "wei2024-s-r32", "--config-overrides", SMALL, "--block-size", "32", "--max-steps", "8",
         "--per-device-train-batch-size", "2", "--logging-steps", "1", "--save-steps", "4", "--eval-steps", "4",
         "--tokenizer-name", str(DEMO_MODEL))  # fmt: skip


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    from lowrank_ft_cli.main import main

    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"Scene {i}. Enter HAMLET. To be, or not to be, that is the question.\n" * 20)
    out = folder / "tokens"
    flags = ["--tokenizer", str(DEMO_MODEL), "--output-dir", str(out), "--held-out", "0.2"]
    assert main(["tokenize", str(folder / "*.txt"), *flags]) == 0
    return out


def pretrain(cli, tokens, output, *flags, check=True):
    command = ("pretrain", *FLAGS, "--dataset", tokens, "--output-dir", output, *flags)
    return cli(*command, check=check, ACCELERATE_USE_CPU="true")


def test_from_token_files_to_a_checkpoint_that_loads_and_goes_on(cli, tokens, tmp_path):
    out = tmp_path / "run"
    done = pretrain(cli, tokens, out, "--guide-mode", "stochastic", "--fixed-flops", "--guided-ratio", "0.25")
    assert done.stdout.splitlines()[-1] == str(out)
    entries = read_metrics(out / "metrics.jsonl")
    start = entries[0]
    assert (start["guided_steps"], start["max_steps"]) == (2, 8 + start["repeated_steps"])
    assert start["repeated_steps"] > 0
    losses = [e["loss"] for e in entries if "loss" in e]
    assert losses[-1] < losses[0] - 0.3
    model = AutoModelForCausalLM.from_pretrained(out)
    layers = dict(lowrank_layers(model))
    # The FFN's linears, but for those of the first block.
    assert sorted(layers) == [f"model.layers.{i}.mlp.{n}" for i in (1, 2, 3) for n in ("c_fc", "c_proj")]
    assert {layer.rank for layer in layers.values()} == {16}  # a quarter of the width
    assert model.config.vocab_size == 2048
    assert "base_model" not in {k for k, v in model.config.quantization_config.to_dict().items() if v}
    with torch.no_grad():
        loss = model(torch.arange(32)[None], labels=torch.arange(32)[None]).loss
    assert torch.isfinite(loss)

    # Another learning rate or another shape is another run, and what differs is said.
    (out / "checkpoints" / "step-00000008" / "trainer_state.json").unlink()
    resume = (
        "--guide-mode",
        "stochastic",
        "--fixed-flops",
        "--guided-ratio",
        "0.25",
        "--resume-from-checkpoint",
        "auto",
    )
    refused = pretrain(cli, tokens, out, *resume, "--learning-rate", "1e-3", "--seed", "7", check=False)
    assert refused.returncode == 1
    assert "learning_rate 0.0006 -> 0.001; seed 42 -> 7; use the old ones" in refused.stderr
    again = pretrain(cli, tokens, out, *resume, "--learning-rate", "1e-3", "--resume-with-changes")
    assert "learning_rate 0.0006 -> 0.001" in again.stderr
    assert read_metrics(out / "metrics.jsonl")[-1]["step"] == start["max_steps"]


def test_any_other_config_and_a_dense_model(cli, tokens, tmp_path):
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 96, "max_position_embeddings": 64, "num_key_value_heads": 2}  # fmt: skip
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "run"
    flags = [f for f in FLAGS if f not in ("--preset", "wei2024-s-r32", "--config-overrides", SMALL)]
    shape = ("--config-name", tmp_path / "llama", "--config-overrides", "{hidden_size: 32, head_dim: 8}")
    cli("pretrain", *flags, *shape, "--rank", "8", "--guide", "none", "--no-dense-first-block", "--target-modules",
        "all-linear", "--dataset", tokens, "--output-dir", out, ACCELERATE_USE_CPU="true")  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.head_dim == 8
    assert len(dict(lowrank_layers(model))) > 6
    dense = tmp_path / "dense"
    done = cli("pretrain", *flags, *shape, "--dataset", tokens, "--output-dir", dense, ACCELERATE_USE_CPU="true")
    assert "warning" not in done.stderr.lower()
    assert not list(lowrank_layers(AutoModelForCausalLM.from_pretrained(dense)))
    # A stock checkpoint with a card that claims nothing else.
    assert not (dense / "lowrank_plugin.py").exists()
    assert "quantization_config" not in json.loads((dense / "config.json").read_text())
    assert "A dense model" in (dense / "README.md").read_text()
    assert "was trained from scratch with low rank" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "4096"], "rank 4096 exceeds"),
        (["--config-overrides", "{hidden_sise: 32}"], "has no value 'hidden_sise'"),
        (["--config-overrides", "32"], "config_overrides '32' is no mapping"),
        (["--preset", "wei2024-xs"], "there is no preset 'wei2024-xs'"),
        (["--config-overrides", "{vocab_size: 100}"], "holds token ids up to"),
        (["--config-overrides", "{rank: 8}"], "rank is no part of the config; say it with --rank"),
        (["--config-overrides", "{tokens: 1000000}"], "say it with --max-steps"),
        (
            ["--config-overrides", "{num_hidden_layers: 1}"],
            "its only block stays dense, so rank 192 applies to nothing",
        ),
        (
            ["--fixed-flops", "--guide", "none"],
            "this model has no guide; take a low-rank model with a guide (--guide dense)",
        ),
        (["--learningrate", "3"], "there is no option --learningrate; did you mean learning_rate"),
        (["--max-steps", "many"], "max-steps: invalid int value: 'many'; see --help"),
    ],
)
def test_bad_input_is_one_line_before_training(tokens, tmp_path, monkeypatch, capsys, flags, message):
    from recipes.pretrain import main

    flags = [*FLAGS, "--dataset", str(tokens), "--output-dir", str(tmp_path / "run"), *flags]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_folder_into_which_another_run_trains_is_refused(tokens, tmp_path, monkeypatch, capsys):
    from recipes.pretrain import main

    monkeypatch.setattr("sys.argv", ["x", *FLAGS, "--dataset", str(tokens), "--output-dir", str(tmp_path / "run")])
    with exclusive(tmp_path / ".run.lock-run", "busy"), pytest.raises(SystemExit):
        main()
    assert "error: another run is training into " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("{num_key_value_heads: 3}", "no model runs with this LlamaConfig: RuntimeError"),
        ("{hidden_size: big}", "LlamaConfig"),
        ("{hidden_act: foo}", "no model runs with this LlamaConfig"),
        ("{num_hidden_layers: -1}", "num_hidden_layers is -1; it must be a whole number of 1 or more"),
        ("{num_layers: 2}", "has no value 'num_layers' that could be set; did you mean num_hidden_layers"),
        ("{to_dict: 2}", "has no value 'to_dict'"),
        ("{model_type: gpt2}", "has no value 'model_type'"),
    ],
)
def test_configs_that_make_no_model_are_one_line(tokens, tmp_path, monkeypatch, capsys, overrides, message):
    from recipes.pretrain import main

    flags = [f for f in FLAGS if f not in ("--preset", "wei2024-s-r32", "--config-overrides", SMALL)]
    flags += ["--config-name", str(DEMO_MODEL), "--rank", "4", "--config-overrides", overrides]
    monkeypatch.setattr("sys.argv", ["x", *flags, "--dataset", str(tokens), "--output-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        main()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_refused_resumption_changes_nothing_and_names_all_that_differs(tokens, tmp_path, monkeypatch, capsys):
    from recipes.pretrain import main

    out = tmp_path / "run"
    argv = ["x", *FLAGS, "--dataset", str(tokens), "--output-dir", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    main()
    run = (out / "run.json").read_text()
    monkeypatch.setattr(
        "sys.argv", [*argv, "--resume-from-checkpoint", "auto", "--no-dense-first-block", "--export-dtype", "bfloat16"]
    )
    with pytest.raises(SystemExit):
        main()
    assert "rank of model.layers.0.mlp.c_fc None -> 16" in capsys.readouterr().err
    assert (out / "run.json").read_text() == run


def test_the_options_check_themselves():
    with pytest.raises(ConfigError, match="either --preset or --config-name"):
        parse_groups((ScratchArguments, PretrainArguments), [])
    with pytest.raises(ConfigError, match="rank or param_ratio, not both"):
        ScratchArguments(preset="wei2024-s", rank=8, param_ratio=0.5)
    with pytest.raises(ConfigError, match="guide 'residual' is unknown; choose one of dense, none"):
        ScratchArguments(preset="wei2024-s", guide="residual")
