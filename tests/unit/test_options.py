"""Every option with values of every other type: a sentence that names it, or a value of its own type."""

import os
from dataclasses import fields
from typing import get_type_hints

import pytest
import yaml
from lowrank_ft_cli.main import build_parser

from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.options import SizeOptions
from lowrank_ft.pretraining.options import PretrainArguments, ScratchArguments
from lowrank_ft.training.arguments import as_rank, parse_groups, read_config
from lowrank_ft.training.options import DataArguments, ModelArguments, TrainArguments

FINETUNE = (ModelArguments, DataArguments, TrainArguments)
PRETRAIN = (ScratchArguments, DataArguments, PretrainArguments)
OPTIONS = [(groups, f) for groups in (FINETUNE, PRETRAIN) for group in groups for f in fields(group)]
LISTS, MAPPINGS = {"target_modules", "exclude_modules", "report_to"}, {"rank_pattern", "config_overrides"}


def read(tmp_path, groups, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    argv = ["--config", str(path)]
    return parse_groups(groups, argv if groups == FINETUNE else [*argv, "--preset", "wei2024-s-r32"])


@pytest.mark.parametrize(("groups", "field"), OPTIONS, ids=lambda v: getattr(v, "name", ""))
def test_every_option_refuses_what_is_not_of_its_type(tmp_path, groups, field):
    values = [None, ["a"], [[1]], [None], {"a": [1]}, {1: 2}, True, "x y", 1.5, -3, 10**30, float("nan"), "1e-4", ""]
    group = next(g for g in groups if field in fields(g))
    kind, path = str(get_type_hints(group)[field.name]), tmp_path / "run.yaml"
    others = {"preset": "wei2024-s-r32"} if group is ScratchArguments else {}
    for value in values:
        path.write_text(yaml.safe_dump({field.name: value}))
        error = None
        try:
            kept = getattr(group(**{**others, **read_config(path, groups)}), field.name)
        except ConfigError as raised:
            error = str(raised)
        if error is not None:
            assert field.name in error.replace("-", "_"), (value, error)
            assert "\n" not in error
        elif value is None:
            assert "None" in kind or kept == []
        elif isinstance(value, list):
            assert (field.name in LISTS, value) == (True, ["a"])
        elif isinstance(value, dict):
            assert field.name in MAPPINGS
        elif value is True:
            assert "bool" in kind or (field.name, kept) == ("resume_from_checkpoint", "auto")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval_steps: null", "eval_steps is null; it must be a whole number"),
        ("learning_rate: [1, 2]", "learning_rate is a list; it must be a number"),
        ("max_steps: 1.5", "max_steps is 1.5; it must be a whole number"),
        ("max_steps: many", "max_steps is 'many'; it must be a whole number"),
        ("trust_remote_code: perhaps", "trust_remote_code is 'perhaps'; it must be true or false"),
        ("rank_pattern: {q_proj: high}", "rank_pattern gives q_proj a text; it must be a number"),
        ("per_device_train_batch_size: 1000000000", "per_device_train_batch_size is 1000000000; it must be 1 to 65536"),
        ("gradient_accumulation_steps: 1000000000", "gradient_accumulation_steps is 1000000000; it must be 1 to"),
        ("lerning_rate: 1", "there is no option 'lerning_rate'; did you mean learning_rate"),
        ("bf16: true", "there is no option 'bf16'; here it is --mixed-precision bf16"),
        (
            "dtype: float16",
            "dtype is float16, in which AdamW divides by 0; it must be float32 or bfloat16, and --mixed-",
        ),
        ("- a", "must hold `name: value` lines"),
        ("a: 2020-13-45", "is no valid YAML"),
        (b"model: \xff\xfe", "is not UTF-8 text"),
        ("a: " + "[" * 50_000, "is nested too deep"),
        ("? [a]\n: b", "is no valid YAML"),
    ],
    ids=range(16),
)
def test_the_message_names_the_file_or_the_option(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, FINETUNE, text)
    assert message in str(caught.value)


def test_words_of_yaml_mean_what_they_say(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "{mixed_precision: no, report_to: none, output_dir: ~/x, learning_rate: 1e-4, max_steps: 1e3, model: ~/m, rank: 8}"
    model, _, train = read(tmp_path, FINETUNE, text)
    assert (train.mixed_precision, train.report_to, train.learning_rate, train.max_steps) == ("no", [], 1e-4, 1000)
    assert (train.output_dir, model.model) == (f"{tmp_path}/x", f"{tmp_path}/m")
    assert as_rank(model.rank) == 8
    assert isinstance(as_rank(model.rank), int)
    assert TrainArguments(output_dir="~/y").output_dir == f"{tmp_path}/y"
    *_, train = parse_groups(FINETUNE, ["--output_dir=~/z", "--report_to", "none", "--mixed_precision", "no"])
    assert (train.output_dir, train.report_to, train.mixed_precision) == (f"{tmp_path}/z", [], "no")
    for value, wanted in (
        ("true", "auto"),
        ("false", None),
        ("yes", "auto"),
        ("auto", "auto"),
        ("a/step-1", "a/step-1"),
    ):
        assert read(tmp_path, FINETUNE, f"resume_from_checkpoint: {value}")[2].resume_from_checkpoint == wanted
    assert read(tmp_path, FINETUNE, "report_to: wandb")[2].report_to == ["wandb"]


def test_paths_of_every_command_begin_at_home():
    options = build_parser().parse_args(["convert", "~/model", "--output-dir=~/x", "--rank", "4"])
    assert (options.model, options.output_dir) == (os.path.expanduser("~/model"), os.path.expanduser("~/x"))
    options = build_parser().parse_args(["tokenize", "~/a", "b", "--tokenizer", "t", "--output-dir", "c"])
    assert options.dataset == [os.path.expanduser("~/a"), "b"]


@pytest.mark.parametrize("declared", [SizeOptions, CalibrationOptions])
def test_flags_are_the_fields_of_the_options(declared):
    options = vars(build_parser().parse_args(["convert", "m"]))
    assert {f.name: options.get(f.name, "no flag") for f in fields(declared)} == {
        f.name: f.default for f in fields(declared)
    }
    given = build_parser().parse_args(["convert", "m", "--rank", "0.5", "--rank_pattern", "a=1", "b=2", "--seed=3"])
    assert (given.rank, given.rank_pattern, given.seed) == (0.5, ["a=1", "b=2"], 3)


@pytest.mark.parametrize(
    ("given", "writes_text", "wanted"),
    [
        ({}, True, True), ({}, False, False), ({"method": "svd"}, True, False), ({"method": "anchored"}, False, True),
        ({"method": "svd", "allocation": "loss"}, False, True), ({"method": "svd", "refine_epochs": 0}, True, False),
        ({"method": "svd", "distill_epochs": 0.5}, True, True), ({"calibration_data": "self"}, False, True),
        ({"calibration_data": ["a.txt", "b.txt"]}, False, True),
    ],
)  # fmt: skip
def test_when_calibration_data_are_wanted(given, writes_text, wanted):
    assert CalibrationOptions(**given).wants_data(writes_text) is wanted
