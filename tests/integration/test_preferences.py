"""TRL's DPOTrainer with a guided policy: the reference that it makes by itself is the policy before its first step."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import GuidanceCallback, LowRankConfig
from lowrank_ft.nn import guided_layers
from tests.conftest import DEMO_MODEL

trl = pytest.importorskip("trl", reason="TRL is not installed; pip install 'lowrank-ft[trl]'")

PAIRS = Dataset.from_list(
    [{"prompt": f"ROMEO: {i}", "chosen": f" my lady, {i} of them.", "rejected": " what is it not?"} for i in range(8)]
)


def dense():
    return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32")


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    model = dense()
    lowrank_ft.convert(model, param_ratio=0.3)
    folder = tmp_path_factory.mktemp("models") / "compact"
    lowrank_ft.save_compact(model, folder)
    return folder


def guided(folder, kind="residual"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    lowrank_ft.attach_guides(model, dense(), kind)
    return model


def trained(model, folder, guided_ratio=0.5, late=False, **options):
    args = trl.DPOConfig(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, logging_steps=1, learning_rate=1e-3,
        use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    callbacks = [] if late else [GuidanceCallback(guided_ratio)]
    trainer = trl.DPOTrainer(
        model, args=args, train_dataset=PAIRS, processing_class=tokenizer, callbacks=callbacks, **options
    )
    if late:
        lowrank_ft.phase_out(trainer, guided_ratio)
    trainer.train()
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", ["residual", "dense"])
def test_a_reference_from_the_compact_checkpoint_gets_the_guides(compact, tmp_path, kind):
    policy = guided(compact, kind)
    trainer, losses = trained(policy, tmp_path, late=kind == "dense")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(losses[1] - math.log(2)) > 0.01  # the policy moves, and the reference does not
    assert not any(guided_layers(trainer.model))
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    layers = dict(guided_layers(reference))
    assert layers
    assert not any(p.requires_grad for layer in layers.values() for p in layer.parameters())
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():  # it computes what the dense model does, also after the policy lost its guides
        torch.testing.assert_close(reference(ids).logits, dense()(ids).logits, atol=1e-3, rtol=1e-3)


def test_the_reference_adapter_of_peft_keeps_its_guide(tmp_path):
    model = get_peft_model(dense(), LowRankConfig(r=16, guide="residual"))
    trainer, losses = trained(model, tmp_path)
    assert "ref" in trainer.model.peft_config
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(losses[1] - math.log(2)) > 0.01
    assert not any(guided_layers(trainer.model))


def test_without_a_guided_step_the_reference_has_no_guide(compact, tmp_path):
    _, losses = trained(guided(compact), tmp_path, guided_ratio=0.0)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


def test_a_reference_of_other_weights_is_left_alone(compact, tmp_path):
    policy = guided(compact)
    other = AutoModelForCausalLM.from_pretrained(compact, dtype="float32")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    before = copy.deepcopy(other.state_dict())
    trainer, losses = trained(policy, tmp_path, ref_model=other)
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    assert not any(guided_layers(reference))
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert abs(losses[0] - math.log(2)) > 0.01
