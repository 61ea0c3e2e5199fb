"""Options for tight memory: forms of AdamW and their state, and training only some of the parameters."""

import copy
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from torch import nn

from lowrank_ft.checkpoints.from_training import load_training_checkpoint
from lowrank_ft.conversion.convert import convert
from lowrank_ft.data.examples import pack
from lowrank_ft.errors import ConfigError, MissingPackageError, TrainingStateError
from lowrank_ft.nn import compact_state_dict
from lowrank_ft.training import TrainArguments, Trainer
from lowrank_ft.training.optimizers import build_adamw, check_optimizer
from lowrank_ft.training.preparation import make_optimizer
from lowrank_ft.training.resume import checkpoint_path, load_optimizer_tensors, optimizer_tensors, unique_tensors
from lowrank_ft.training.trainable import merge_adapters, restrict_training
from tests.conftest import tiny_llama

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("fresh_accelerate", "no_picture")


@pytest.fixture
def data():
    return pack((np.arange(40 * 16) % 90 + 3).astype(np.int32), 16)


def arguments(tmp_path, **overrides):
    options = dict(
        output_dir=str(tmp_path / "run"), max_steps=4, guided_ratio=0.5, per_device_train_batch_size=4,
        learning_rate=1e-2, seed=0, load_best_model_at_end=False,
    )  # fmt: skip
    return TrainArguments(**{**options, **overrides})


def guided(guide="residual"):
    model = tiny_llama()
    convert(model, rank=8, guide=guide)
    return model


# Optimizers


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))  # weights of 6144 elements, and small biases


def steps(model, optimizer, count, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        model(torch.randn(8, 64, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit"])
def test_state_comes_back_bit_for_bit(tmp_path, name):
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    args = arguments(tmp_path, optim=name)
    first = two_layers()
    optimizer = make_optimizer(first, args)
    steps(first, optimizer, 3, seed=1)
    tensors = load(save(unique_tensors(optimizer_tensors(first, optimizer))))  # through the file, as a checkpoint does
    second = copy.deepcopy(first)
    again = make_optimizer(second, args)
    load_optimizer_tensors(second, again, tensors)
    steps(first, optimizer, 3, seed=2)
    steps(second, again, 3, seed=2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (unique_tensors(optimizer_tensors(m, o)) for m, o in [(first, optimizer), (second, again)])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_eight_bits_take_a_quarter_of_the_memory(tmp_path):
    pytest.importorskip("bitsandbytes")
    size = {}
    for name in ("adamw_torch", "adamw_8bit"):
        model = two_layers()
        optimizer = make_optimizer(model, arguments(tmp_path, optim=name))
        steps(model, optimizer, 1, seed=1)
        size[name] = sum(t.nbytes for t in optimizer_tensors(model, optimizer).values())
        dtypes = {
            optimizer_tensors(model, optimizer)[k].dtype for k in optimizer_tensors(model, optimizer) if "0.weight" in k
        }
        assert (torch.uint8 in dtypes) is (name == "adamw_8bit")
    weights, vectors = 2 * 6144, 160
    assert size["adamw_torch"] == 8 * (weights + vectors) + 4 * 4
    assert size["adamw_8bit"] == 2 * weights + 2 * 4 * weights // 256 + 8 * vectors + 4 * 8


def test_state_of_another_optimizer_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = two_layers()
    optimizer = make_optimizer(model, arguments(tmp_path))
    steps(model, optimizer, 1, seed=1)
    tensors = optimizer_tensors(model, optimizer)
    with pytest.raises(TrainingStateError, match="is not that of AdamW8bit"):
        load_optimizer_tensors(model, make_optimizer(model, arguments(tmp_path, optim="adamw_8bit")), tensors)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paged_memory_is_refused_where_the_device_has_none(tmp_path, data, name):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=f"optim {name} cannot be used on the device cpu"):
        Trainer(guided(), arguments(tmp_path, optim=name), data)
    assert not (tmp_path / "run").exists()


def test_sharded_parameters_unknown_names_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="optim 'adam8' is unknown; choose one of adamw_torch, adamw_torch_fused"):
        arguments(tmp_path, optim="adam8")
    check_optimizer("adamw_torch_fused", CPU, sharded=True)
    if pytest.importorskip("bitsandbytes"):
        with pytest.raises(ConfigError, match="does not take sharded parameters"):
            check_optimizer("adamw_8bit", CPU, sharded=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"pip install lowrank-ft\[quantized\]"):
        build_adamw("adamw_8bit", [{"params": [nn.Parameter(torch.zeros(4, 4))]}])


# Only some parameters


@pytest.mark.parametrize("trainable", ["factors", "lora", "leading"])
def test_only_the_factors_change_and_the_export_has_the_same_shapes(tmp_path, data, trainable):
    model = guided()
    before = {k: v.clone() for k, v in compact_state_dict(model).items()}
    seen = {}

    def look(step, trainer):
        if step == 4:
            tensors = optimizer_tensors(model, trainer.optimizer)
            seen["state"] = sum(t.nbytes for k, t in tensors.items() if not k.startswith("step."))
            seen["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            model.eval()
            seen["logits"] = model(data[0]["input_ids"][None]).logits.detach()

    args = arguments(tmp_path, trainable=trainable, lora_r=4, save_steps=4)
    Trainer(model, args, data, on_step_end=look).train()
    after = model.state_dict()
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed == {k for k in after if k.endswith((".U.weight", ".V.weight"))}
    torch.testing.assert_close(model(data[0]["input_ids"][None]).logits, seen["logits"], rtol=1e-4, atol=1e-5)

    factors = [v for k, v in before.items() if k.endswith((".U.weight", ".V.weight"))]
    wanted = sum(w.numel() if trainable == "factors" else 4 * sum(w.shape) for w in factors)
    assert (seen["trained"], seen["state"]) == (wanted, 8 * wanted)
    assert wanted < sum(v.numel() for v in before.values())

    exported, _, _ = load_training_checkpoint(checkpoint_path(tmp_path / "run", 4))
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, after[name], rtol=1e-5, atol=1e-6, msg=name)


def test_adapters_survive_a_resume(tmp_path, data):
    """Stopped by an error after step 2, resumed: the same weights as without."""

    def stop(step, _):
        if step == 2:
            raise InterruptedError

    straight = guided()
    Trainer(straight, arguments(tmp_path / "a", trainable="leading", lora_r=4), data).train()
    with pytest.raises(InterruptedError):
        Trainer(
            guided(), arguments(tmp_path / "b", trainable="leading", lora_r=4, save_steps=1), data, on_step_end=stop
        ).train()
    resumed = guided()
    again = dict(trainable="leading", lora_r=4, save_steps=1, resume_from_checkpoint="auto")
    Trainer(resumed, arguments(tmp_path / "b", **again), data).train()
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    with pytest.raises(TrainingStateError, match="trainable 'leading' -> 'factors'"):
        Trainer(guided(), arguments(tmp_path / "b", **{**again, "trainable": "factors"}), data).train()


def test_leading_directions_are_those_of_the_product():
    model = guided()
    layer = model.model.layers[0].mlp.up_proj
    u, v = layer.U.weight.detach().clone(), layer.V.weight.detach().clone()
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    state = torch.get_rng_state()
    restrict_training(model, "leading", r=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    parts = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in (layer.U, layer.V)]
    left, values, right = torch.linalg.svd(u @ v)
    best = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(parts[0] @ parts[1], best, rtol=1e-3, atol=1e-4)
    assert merge_adapters(model) == 2 * 14
    torch.testing.assert_close(layer.U.weight, u, rtol=1e-4, atol=1e-5)
    assert not hasattr(model, "peft_config")


def test_adapters_that_the_caller_brought_stay_his(tmp_path):
    model = tiny_llama()
    convert(model, rank=8)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["U", "V"]))
    data = pack(np.arange(3, 83, dtype=np.int32), 8)
    args = TrainArguments(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2)
    trained = Trainer(model, args, data).train()
    adapters = [p for n, p in trained.named_parameters() if "lora_B" in n]
    assert len(adapters) == 2 * 14
    assert all(p.abs().sum() > 0 for p in adapters)
    assert trained is model


def test_lora_gets_the_scale_that_was_asked_for():
    model = guided()
    restrict_training(model, "lora", r=4, alpha=12)
    assert model.model.layers[0].mlp.up_proj.U.scaling == {"default": 3.0}


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: guided("dense"), {"trainable": "factors"}, "a dense guide is trained in full"),
        (tiny_llama, {"trainable": "lora"}, "the model has no factored linears"),
        (guided, {"trainable": "leading"}, "lora_r is 16, and .* has rank 8; give --lora-r 8 or less"),
    ],
)
def test_restrictions_that_do_not_fit(tmp_path, data, make, options, words):
    with pytest.raises(ConfigError, match=words):
        Trainer(make(), arguments(tmp_path, **options), data)
