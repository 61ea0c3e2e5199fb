"""The estimate of peak training memory: its parts against real models, and its peak against a measured one."""

import json
import warnings

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from lowrank_ft.costs.memory import MODES, Architecture, Mode, Settings, estimate
from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.nn import guided_layers
from tests.benchmarks.memory import GPT2, LLAMA, TARGET, _Profiled, measure, prepare, random_model
from tests.conftest import DEMO_MODEL, tiny_llama

SHORT = {"batch_size": 2, "block_size": 64, "device": "cpu"}
NAMED = {mode.name: mode for mode in MODES}


def estimated(config, mode, settings, ratio=0.5):
    model = random_model(config, settings.dtype)
    plan = make_plan(model, param_ratio=ratio)
    return model, plan, estimate(plan, Architecture.of(model), mode, settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [m.name for m in MODES if m.method != "qlora"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_weights_guides_and_gradients_are_counted_exactly(config, name, dtype):
    if "4 bits" in name:
        pytest.importorskip("bitsandbytes")
    small = {**config, "num_hidden_layers": 2} if "hidden_size" in config else {**config, "n_layer": 2}
    model, plan, guess = estimated(small, NAMED[name], Settings(dtype=dtype, **SHORT))
    prepare(model, plan, NAMED[name], Settings(dtype=dtype))
    guides = sum(p.nbytes for _, layer in guided_layers(model) for p in layer.guide.parameters())
    weights = sum(p.nbytes for p in model.parameters()) - guides
    assert (guess.weights, guess.guide) == (weights, guides)
    assert guess.gradients == sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert guess.optimizer == 2 * guess.gradients


@pytest.mark.parametrize(
    ("config", "mode", "changes"),
    [
        (LLAMA, NAMED["no guide"], {}),
        (LLAMA, NAMED["guide residual, 4 bits"], {"gradient_checkpointing": True, "optim": "adamw_8bit"}),
        (GPT2, NAMED["guide dense"], {"block_size": 16}),  # gradients and moments outweigh activations
        (LLAMA, Mode("lora", "factors", "residual", None, "lora"), {"mixed_precision": "bf16"}),
    ],
    ids=["loss", "packed", "step", "adapters"],
)
def test_the_peak_is_within_fifteen_percent(config, mode, changes):
    if mode.guide_bits:
        pytest.importorskip("bitsandbytes")
    settings = Settings(**{**SHORT, **changes})
    model, plan, guess = estimated(config, mode, settings)
    prepare(model, plan, mode, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler says that it does not know older memory
        found = measure(model, mode, settings, "cpu")
    assert found > guess.weights + guess.guide + guess.optimizer
    assert guess.peak == pytest.approx(found, rel=TARGET)


def test_the_meter_sees_what_is_allocated_and_released():
    class Run:
        _bare, optimizer = torch.nn.Linear(100, 100, bias=False), torch.optim.SGD([torch.zeros(1)])

    meter = _Profiled()
    meter.start(Run)
    first = torch.empty(250_000)
    del first
    second, third = torch.empty(500_000), torch.empty(100_000)
    meter.stop()
    assert meter.peak == 4 * (10_000 + 500_000 + 100_000)
    del second, third


def test_what_saves_memory_saves_it():
    """By the arithmetic alone, for a model of 7 billion parameters: nothing is allocated."""
    config = {**LLAMA, "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
    with torch.device("meta"):
        model = random_model(config, "float32")
    plan, architecture = make_plan(model, param_ratio=0.5), Architecture.of(model)

    def peak(mode, **changes):
        return estimate(plan, architecture, mode, Settings(**{"batch_size": 4, "block_size": 512, **changes})).peak

    names = ("guide dense", "guide residual", "guide residual, 4 bits", "no guide")
    peaks = [peak(NAMED[name]) for name in names]
    assert peaks == sorted(peaks, reverse=True)
    packed = 4 - 0.5 - 4 / 64  # bytes that a number of the guide needs no longer
    assert peaks[1] - peaks[2] == pytest.approx(packed * sum(p.dense_parameters for p in plan.linears), rel=0.02)
    plain = peak(NAMED["no guide"])
    for change in ({"optim": "adamw_8bit"}, {"optim": "adamw_torch_fused"}, {"dtype": "bfloat16"}):
        assert peak(NAMED["no guide"], **change) < plain
    # At 4 x 512 tokens the optimizer's step is the peak: fewer activations change nothing, unless there are more tokens.
    assert peak(NAMED["no guide"], gradient_checkpointing=True) == plain
    long = {"batch_size": 16, "block_size": 2048}
    assert peak(NAMED["no guide"], gradient_checkpointing=True, **long) < 0.5 * peak(NAMED["no guide"], **long)
    assert peak(NAMED["no guide"], optim="adamw_8bit") < plain - 0.7 * 8 * plan.converted_model_parameters
    assert peak(NAMED["no guide"], gradient_accumulation_steps=2) >= plain
    assert peak(Mode("", "factors", "residual", 4, "lora"), dtype="bfloat16") < peak(NAMED["LoRA"], dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch_size": 0}, "batch_size is 0"), ({"dtype": "int8"}, "dtype 'int8'"), ({"optim": "sgd"}, "optim 'sgd'")],
)
def test_settings_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        Settings(**options)


def test_models_that_the_arithmetic_does_not_cover():
    with torch.device("meta"):
        experts = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=64))
        pair = T5ForConditionalGeneration(T5Config(num_layers=1))
    for model in (experts, pair, torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="cannot be estimated"):
            Architecture.of(model)
    assert Architecture.of(tiny_llama()).ffn_kept == 4


def test_plan_prints_it(command):
    flags = ("--param-ratio", "0.5", "--memory", "--batch-size", "4", "--block-size", "64")
    done = command("plan", DEMO_MODEL, *flags)
    assert done.returncode == 0
    assert "guide residual, 4 bits" in done.stdout
    assert "4 x 64 tokens, float32, adamw_torch" in done.stdout
    report = json.loads(command("plan", DEMO_MODEL, *flags, "--json", "--optim", "adamw_8bit").stdout)["memory"]
    assert [m["mode"] for m in report["modes"]] == [m.name for m in MODES]
    assert all(m["peak"] > m["weights"] + m["guide"] + m["optimizer"] for m in report["modes"])
    assert report["settings"]["optim"] == "adamw_8bit"
    assert "memory" not in json.loads(command("plan", DEMO_MODEL, "--param-ratio", "0.5", "--json").stdout)
    done = command("plan", DEMO_MODEL, *flags[:-1], "100000")
    assert done.returncode == 1
    assert "exceeds the" in done.stderr
