"""``GuidanceCallback`` in ``transformers.Trainer`` on two processes with FSDP2, against one at equal global batch."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft import GuidanceCallback
from lowrank_ft.errors import ConfigError
from lowrank_ft.integrations.transformers_trainer import patches
from lowrank_ft.training import fsdp
from tests.callback_driver import GUIDED, STEPS, launch, make_model, make_trainer, outcome, saved_weights, series
from tests.conftest import tiny_llama

FORMS = {"FULL_STATE_DICT": ("dense", "peft-residual"), "SHARDED_STATE_DICT": ("residual",)}
KINDS = [kind for kinds in FORMS.values() for kind in kinds]
RESUMED = (GUIDED - 2, GUIDED + 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What both processes wrote of a run, and its folder: ``runs(kind, "straight")``. One launch for each form."""
    output = tmp_path_factory.mktemp("fsdp2")
    for form, kinds in FORMS.items():
        launch(
            output, kinds, RESUMED, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2",
            FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP", FSDP_STATE_DICT_TYPE=form,
        )  # fmt: skip
    return partial(outcome, output)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_the_same_global_batch(runs, tmp_path, kind):
    one = make_trainer(make_model(kind, 0.0), tmp_path / "one", GuidanceCallback(0.5), save_strategy="no")
    one.train()
    parameters = len(list(one.model.parameters()))
    for rank in runs(kind, "straight")[0]:
        assert rank["world"] == 2
        assert rank["type"].startswith("FSDP")
        assert rank["sharded"] == parameters  # all of them are DTensors
        assert rank["losses"] == pytest.approx(series(one, "loss"), rel=2e-4)
        assert rank["alphas"] == series(one, "alpha")
        assert rank["optimized"] == sum(len(group["params"]) for group in one.optimizer.param_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guides_leave_the_memory(runs, kind):
    tensors = 28 if kind == "peft-residual" else 14
    shape = tiny_llama()
    weights = [m.weight for n, m in shape.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    half = sum(w.numel() * w.element_size() for w in weights) // 2  # a process holds half of each guide
    for rank in runs(kind, "straight")[0]:
        assert [rank["alive"][str(step)] for step in (1, GUIDED - 1, GUIDED, STEPS)] == [tensors, tensors, 0, 0]
        freed = rank["live_bytes"][str(GUIDED - 1)] - rank["live_bytes"][str(STEPS)]
        if kind == "dense":
            assert freed >= 3 * half  # W and its two moments; gradients are gone at the end of a step
        elif kind == "residual":
            assert freed >= half
        else:
            assert freed > 0  # initial factors; the dense weight is PEFT's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", RESUMED)
def test_two_processes_resume_to_the_same_run(runs, kind, step):
    for found, expected in zip(runs(kind, f"from-{step}")[0], runs(kind, "straight")[0], strict=True):
        assert (found["world"], found["type"]) == (2, expected["type"])
        assert (found["losses"], found["checksum"]) == (expected["losses"], expected["checksum"])
        assert min(map(int, found["alive"])) == step + 1
        assert found["alive"][str(STEPS)] == 0
    again, straight = (saved_weights(runs(kind, run)[1] / "final") for run in (f"from-{step}", "straight"))
    assert again.keys() == straight.keys()
    assert all(torch.equal(again[name], straight[name]) for name in straight)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_compact_and_that_of_one_process(runs, tmp_path, kind, ids):
    one = make_trainer(make_model(kind, 0.0), tmp_path / "one", GuidanceCallback(0.5), save_strategy="no")
    one.train()
    final = runs(kind, "straight")[1] / "final"
    if kind.startswith("peft"):
        loaded = PeftModel.from_pretrained(tiny_llama(), final)
    else:
        assert not any("guide" in k for k in saved_weights(final))
        loaded = AutoModelForCausalLM.from_pretrained(final)
        assert loaded.config.architectures == ["LlamaForCausalLM"]
    expected = one.model.eval()(ids).logits
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_refused_under_fsdp(monkeypatch):
    """Before a step, and before anything is sharded."""
    model = tiny_llama()
    lowrank_ft.convert(model, rank=8, guide="dense")
    plugin = SimpleNamespace(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy=None, activation_checkpointing=False,
        state_dict_type="StateDictType.FULL_STATE_DICT",
    )  # fmt: skip
    trainer = SimpleNamespace(
        model=model, train=lambda *_: pytest.fail("trained"), args=SimpleNamespace(load_best_model_at_end=True),
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), model_init=None, call_model_init=None,
    )  # fmt: skip
    monkeypatch.setattr(fsdp, "uses_fsdp", lambda _: True)
    patches.prepare_before_training(trainer, GuidanceCallback.prepare_for_resume)
    with pytest.raises(ConfigError, match="SHARDED_STATE_DICT, or load_best_model_at_end=False"):
        trainer.train()
    plugin.fsdp_version = 1
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        trainer.train()
    monkeypatch.setattr(patches, "AcceleratorState", lambda: SimpleNamespace(distributed_type="FSDP"))
    with pytest.raises(ConfigError, match="instead of add_callback"):
        patches.require_units(model)
