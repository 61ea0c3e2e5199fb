"""Sizes and training FLOPs: against the papers' printed tables, sums done by hand, and FLOPs counted as they happen."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MixtralConfig, T5Config

import lowrank_ft
from lowrank_ft.costs.flops import attention_scores, training_cost
from lowrank_ft.errors import ConfigError, RankError
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.targets import block_index, ffn_linears
from lowrank_ft.pretraining.presets import PRESETS, preset
from tests.conftest import tiny_gpt2, tiny_llama
from tests.integration.test_cli import assert_one_line_error

# Parameters (M), FFN parameters (M), training FLOPs: the digits of Wei et al. 2024.
TABLE = {
    "s": ["110 57 1.69e18", "90 37 1.44e18", "74 21 1.22e18"],
    "m": ["335 201 1.55e19", "263 129 1.26e19", "202 69 1.01e19"],
    "l": ["729 453 7.03e19", "566 290 5.61e19", "431 155 4.42e19"],
    "xl": ["1274 805 2.10e20", "985 516 1.66e20", "744 275 1.29e20"],
}
RANKS = {"s": (384, 192), "m": (512, 256), "l": (768, 384), "xl": (1024, 512)}


@pytest.mark.parametrize("size", TABLE)
def test_the_papers_tables(size):
    for name, rank, printed in zip(["", "-r63", "-r32"], [None, *RANKS[size]], TABLE[size], strict=True):
        made = preset(f"wei2024-{size}{name}")
        found = made.accounting()
        assert made.rank == rank
        digits = f"{found.parameters / 1e6:.0f} {found.ffn_parameters / 1e6:.0f} {found.training_flops:.2e}"
        assert digits.replace("e+", "e") == printed


@pytest.mark.parametrize(("name", "printed"), [("wei2024-m-wide", "219 1.55e19"), ("wei2024-l-wide", "464 7.03e19")])
def test_wide_and_structured(name, printed):
    found = preset(name).accounting()
    assert f"{found.parameters / 1e6:.0f} {found.training_flops:.2e}".replace("e+", "e") == printed
    dense = preset(name.removesuffix("-wide")).accounting()  # which it matches in FLOPs
    assert found.training_flops == pytest.approx(dense.training_flops, rel=0.005)


def test_there_are_fourteen_presets():
    assert len(PRESETS) == len(set(PRESETS)) == 4 * 3 + 2


def test_values_that_are_not_given_follow_those_that_are():
    made = preset("wei2024-s-r63", hidden_size=96, num_attention_heads=6, num_hidden_layers=3)
    assert (made.head_dim, made.num_key_value_heads, made.intermediate_size, made.rank) == (16, 6, 384, 48)
    assert preset("wei2024-s", rank=0.25).rank == 192
    assert preset("wei2024-s-r63", rank=None) == preset("wei2024-s-r63").dense
    wide = preset("wei2024-m-wide", hidden_size=512)
    assert (wide.head_dim, wide.intermediate_size, wide.rank) == (64, 4864, 512)


def test_the_first_block_can_have_low_rank_too():
    first_dense, none_dense = preset("wei2024-s-r63"), preset("wei2024-s-r63", dense_first_block=False)
    saved = 2 * 768 * 3072 - 2 * 384 * (768 + 3072)
    assert first_dense.accounting().parameters - none_dense.accounting().parameters == saved


@pytest.mark.parametrize(
    ("name", "overrides", "error", "says"),
    [
        ("wei2024-s-r64", {}, ConfigError, "there is no preset 'wei2024-s-r64'; did you mean wei2024-s-r63?"),
        ("wei2024-s-wide", {}, ConfigError, "the presets are wei2024-s, wei2024-s-r63,"),
        ("wei2024-s", {"hiden_size": 1}, ConfigError, "a preset has no value 'hiden_size'; it has hidden_size"),
        (
            "wei2024-s-r63",
            {"rank": 800},
            RankError,
            "rank 800 exceeds min(out_features, in_features)=768 for the FFN of",
        ),
        ("wei2024-m-wide", {"hidden_size": 256}, RankError, "rank 512 exceeds min(out_features, in_features)=256"),
        ("wei2024-s-r63", {"intermediate_size": 128}, RankError, "rank 384 exceeds"),
        ("wei2024-s-r63", {"rank": 0}, RankError, "is not positive"),
        ("wei2024-s", {"hidden_size": 250}, ConfigError, "hidden_size 250 is no multiple of 12 heads"),
        ("wei2024-s", {"hidden_size": 36}, ConfigError, "head_dim 3 is odd"),
        ("wei2024-s", {"num_key_value_heads": 5}, ConfigError, "12 query heads cannot share 5 key-value heads"),
        ("wei2024-s", {"vocab_size": -1}, ConfigError, "vocab_size -1 is no whole number"),
        ("wei2024-s", {"num_hidden_layers": 2.5}, ConfigError, "num_hidden_layers 2.5 is no whole number"),
        ("wei2024-s", {"dense_first_block": 3}, ConfigError, "dense_first_block 3 is neither true nor false"),
        ("wei2024-s", {"tokens": 1000}, ConfigError, "1,000 tokens are less than one step of 512 x 1024 = 524,288"),
        ("wei2024-s-r63", {"num_hidden_layers": 1}, ConfigError, "its only block stays dense"),
    ],
)
def test_presets_that_cannot_be(name, overrides, error, says):
    with pytest.raises(error, match=re.escape(says)):
        preset(name, **overrides)


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_of_transformers_has_the_size_of_the_arithmetic(name):
    """The stock architecture holds the preset exactly, biases and norms included."""
    made, config = preset(name), lowrank_ft.preset_config(name)
    assert type(config).from_dict(config.to_dict()).head_dim == made.head_dim
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model.model.layers[0].self_attn.o_proj.in_features == made.attention_width
    assert model.model.layers[0].self_attn.k_proj.out_features == made.key_width
    targets = [s.name for s in ffn_linears(model) if block_index(model, s.name) != 0]
    plan = make_plan(model, rank=made.rank or 1, target_modules=targets)
    cost = training_cost(model, plan, made.steps * made.tokens_per_step, made.sequence_length)
    assert cost.dense == made.dense.accounting()
    assert cost.uncounted == ()
    if made.rank is not None:
        assert cost.low_rank == made.accounting()


def test_a_llama_with_grouped_heads_by_hand():
    """Two blocks; 4 query heads and 2 key-value heads of width 16, which makes queries wider (64) than the model (32)."""
    with torch.device("meta"):
        model = tiny_llama(head_dim=16)
    plan = make_plan(model, rank=8, target_modules=["gate_proj", "up_proj", "down_proj"])
    cost = training_cost(model, plan, tokens=1000, sequence_length=10)
    attention = 32 * 64 + 32 * 32 + 32 * 32 + 64 * 32  # q, k, v, o
    scores = 10 * 64 + 10 * 64  # each query meets 10 keys, each weight 10 values, at the width of the queries
    ffn, factored, head = 3 * 32 * 48, 3 * 8 * (32 + 48), 97 * 32
    assert cost.dense.training_flops == 6 * 1000 * (2 * (attention + scores + ffn) + head)
    assert cost.low_rank.training_flops == 6 * 1000 * (2 * (attention + scores + factored) + head)
    assert cost.dense.ffn_parameters == 2 * ffn
    assert cost.low_rank.ffn_parameters == 2 * factored
    norms = 5 * 32
    assert cost.dense.parameters == 2 * 97 * 32 + 2 * (attention + ffn) + norms


def test_gpt2_by_hand():
    with torch.device("meta"):
        model = tiny_gpt2()
    plan = make_plan(model, rank=4)
    cost = training_cost(model, plan, tokens=1000, sequence_length=64)
    attention, ffn, head, scores = 32 * 96 + 32 * 32, 2 * 32 * 128, 97 * 32, 2 * 64 * 32
    low_attention, low_ffn = 4 * (32 + 96) + 4 * (32 + 32), 2 * 4 * (32 + 128)
    assert cost.dense.training_flops == 6 * 1000 * (2 * (attention + ffn + scores) + head)
    assert cost.low_rank.training_flops == 6 * 1000 * (2 * (low_attention + low_ffn + scores) + head)
    assert (cost.dense.ffn_parameters, cost.low_rank.ffn_parameters) == (2 * ffn, 2 * low_ffn)
    biases, norms, positions = 96 + 32 + 128 + 32, 4 * 32, 64 * 32
    assert cost.dense.parameters == head + positions + 2 * (attention + ffn + biases + norms) + 2 * 32


@pytest.mark.parametrize("lowrank", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "preset"])
def test_flops_as_torch_counts_them(family, lowrank):
    """A real forward and backward pass, matrix product by matrix product."""
    eager = {"attn_implementation": "eager"}  # a fused kernel may skip what the mask hides
    if family == "preset":
        sizes = dict(hidden_size=64, num_hidden_layers=2, vocab_size=97, intermediate_size=96, rank=16)
        model = AutoModelForCausalLM.from_config(lowrank_ft.preset_config("wei2024-m-wide", **sizes), **eager)
    else:
        model = tiny_llama(head_dim=16) if family == "llama" else tiny_gpt2()
        model.set_attn_implementation("eager")
    model.train()
    targets = [s.name for s in ffn_linears(model) if block_index(model, s.name) != 0]
    plan = make_plan(model, rank=8, target_modules=targets)
    cost = training_cost(model, plan, tokens=2 * 12, sequence_length=12)
    if lowrank:
        assert lowrank_ft.initialize_lowrank(model, rank=8) == plan
    ids = torch.randint(0, 97, (2, 12))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # In some releases of transformers the angles of rotary positions are a small product too.
    angles = 0 if family == "gpt2" else 2 * 12 * (model.config.head_dim // 2)
    expected = (cost.low_rank if lowrank else cost.dense).training_flops
    assert counter.get_total_flops() - expected in (0, angles)


def test_windows_and_layers_of_other_kinds():
    small = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, vocab_size=97)
    assert attention_scores(MistralConfig(**small, sliding_window=8), 32) == (3 * 8 * 2 * 64, ())
    assert attention_scores(MistralConfig(**small, sliding_window=None), 32) == (3 * 32 * 2 * 64, ())
    mixed = LlamaConfig(**small)
    mixed.layer_types = ["linear_attention", "linear_attention", "full_attention"]
    total, uncounted = attention_scores(mixed, 32)
    assert total == 32 * 2 * 64
    assert uncounted == ("the mixing of tokens in 2 layers of type linear_attention",)
    latent = LlamaConfig(**small)
    latent.qk_head_dim, latent.v_head_dim, latent.head_dim = 24, 12, 8
    assert attention_scores(latent, 32) == (3 * 32 * 4 * (24 + 12), ())
    uneven = SimpleNamespace(num_hidden_layers=3, num_attention_heads=[4, 2, 4], hidden_size=64)
    with pytest.raises(ConfigError, match=re.escape("num_attention_heads [4, 2, 4]")):
        attention_scores(uneven, 32)


def test_routers_are_not_passed_over_in_silence():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, num_local_experts=4,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    cost = training_cost(model, make_plan(model, rank=8), 1000, 16)
    assert cost.uncounted == (f"{2 * 4 * 32:,} parameters in MixtralTopKRouter",)


@pytest.mark.parametrize(("tokens", "length", "says"), [(0, 8, "tokens 0"), (8, 0, "sequence length 0")])
def test_nothing_to_train_on(tokens, length, says):
    model = tiny_llama()
    with pytest.raises(ConfigError, match=says):
        training_cost(model, make_plan(model, rank=8), tokens, length)


# ---- the command


def test_the_command_prints_the_tables_digits(command):
    out = command("plan", "--preset", "wei2024-xl-r32").stdout
    assert re.search(r"dense +1274 M +805 M +2\.10e20", out)
    assert re.search(r"low-rank +744 M +275 M +1\.29e20", out)
    out = command("plan", "--preset", "wei2024-l-wide").stdout
    assert re.search(r"low-rank +464 M +\d+ M +7\.03e19", out)
    assert "12 heads, 4 for keys and values, of 64" in out
    assert "low-rank" not in command("plan", "--preset", "wei2024-s").stdout


def test_values_of_a_preset_from_the_command_line(command):
    flags = ["--set", "hidden-size=96", "num_hidden_layers=3", "--set", "vocab_size=512", "sequences_per_step=8"]
    flags += ["--rank", "0.25", "--tokens", "1.5M", "--sequence-length", "128", "--json"]
    found = json.loads(command("plan", "--preset", "wei2024-s-r63", *flags).stdout)
    made = preset(
        "wei2024-s-r63", hidden_size=96, num_hidden_layers=3, vocab_size=512, sequences_per_step=8, rank=24,
        tokens=1_500_000, sequence_length=128,
    )  # fmt: skip
    assert found["preset"]["steps"] == made.steps == math.floor(1_500_000 / (8 * 128))
    assert found["low_rank"] == vars(made.accounting())
    assert found["dense"] == vars(made.dense.accounting())
    done = command("plan", "--preset", "wei2024-s-r63", "--set", "rank=700")
    assert "rank 700 takes as many FLOPs in training as the dense model, or more" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--preset", "wei2024-s-r63", "--set", "rank=4096"], "rank 4096 exceeds min(out_features, in_features)=768"),
        (["--preset", "wei2024-s-r63", "--rank", "4096"], "rank 4096 exceeds min(out_features, in_features)=768"),
        (["--preset", "wei2024-s-r63", "--rank", "8", "--set", "rank=8"], "rank is given twice"),
        (["--preset", "wei2024-s", "--set", "rank"], "--set 'rank' is not of the form NAME=VALUE"),
        (["--preset", "wei2024-s", "--set", "hidden_size=big"], "hidden_size 'big' is no whole number"),
        (["--preset", "wei2024-s", "--param-ratio", "0.5"], "--param-ratio applies to a model, not to a preset"),
        (["--preset", "wei2024-s", "some/model"], "give a model or --preset, not both"),
        (["--preset", "s"], "there is no preset 's'"),
    ],
)
def test_presets_that_the_command_refuses(command, flags, says):
    assert_one_line_error(command("plan", *flags), says)


def test_training_flops_of_a_model_that_is_only_a_config(command, tmp_path):
    config = lowrank_ft.preset_config("wei2024-s", num_hidden_layers=2, vocab_size=512)
    config.save_pretrained(tmp_path / "new")
    plan = ["plan", tmp_path / "new", "--rank", "64", "--target-modules", r".*\.1\.mlp.*"]
    done = command(*plan, "--tokens", "300M", "--json")
    found = json.loads(done.stdout)
    made = preset("wei2024-s", num_hidden_layers=2, vocab_size=512, rank=64)
    for model, expected in [("dense", made.dense.accounting()), ("low_rank", made.accounting())]:
        assert found["training"][model]["parameters"] == expected.parameters
        per_token = expected.training_flops // (made.steps * made.tokens_per_step)
        assert found["training"][model]["training_flops"] == 300_000_000 * per_token
    assert "training  300 M tokens in sequences of 1024: " in command(*plan, "--tokens", "300M").stdout
    assert_one_line_error(command(*plan), "holds no model.safetensors")
    longer = command(*plan, "--tokens", "300M", "--sequence-length", "2048")
    assert_one_line_error(longer, "--sequence-length 2048 exceeds the 1024 positions")
    alone = command(*plan, "--sequence-length", "512")
    assert_one_line_error(alone, "--sequence-length applies to training FLOPs; add --tokens")
    values = command(*plan, "--set", "hidden_size=8")
    assert_one_line_error(values, "--set changes values of a preset, and no --preset is given")


def test_other_models_than_causal_language_models(command, tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    done = command("plan", tmp_path / "t5", "--rank", "8", "--tokens", "1B")
    assert_one_line_error(done, "--tokens counts the training of causal language models")


@pytest.mark.parametrize("flags", [[], ["--preset", "wei2024-s", "--tokens", "many"], ["--preset", "wei2024-s",
                                    "--tokens", "0"], ["--preset", "wei2024-s", "--tokens", "1.0005k"]])  # fmt: skip
def test_wrong_usage_of_plan(flags, capsys):
    from lowrank_ft_cli.main import main

    with pytest.raises(SystemExit) as end:
        main(["plan", *flags])
    assert end.value.code == 2
