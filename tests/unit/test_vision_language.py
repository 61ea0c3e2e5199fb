"""Text calibration of vision-language models: it says nothing about the part that sees, which must not suffer."""

import copy

import pytest
import torch
import transformers as tf

import lowrank_ft
from lowrank_ft import make_plan
from lowrank_ft.conversion.calibration import Calibration
from lowrank_ft.conversion.convert import allocate
from lowrank_ft.conversion.estimate import measure
from lowrank_ft.nn import lowrank_layers
from tests.integration.test_loading_by_any_class import llava, qwen2_vl


@torch.no_grad()
def seen(model, kind):
    """What the vision part makes of random pixels."""
    generator = torch.Generator().manual_seed(2)
    if kind == "llava":
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return model.model.vision_tower(pixels).last_hidden_state
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    return model.model.visual(pixels, grid_thw=torch.tensor([[1, 4, 4]])).last_hidden_state


@pytest.mark.parametrize(("kind", "build", "text"), [
    ("llava", llava, tf.LlamaModel), ("qwen2_vl", qwen2_vl, tf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel)
])  # fmt: skip
def test_what_text_does_not_reach_is_converted_by_its_weights(kind, build, text, monkeypatch):
    torch.manual_seed(0)
    model = build().eval()
    ids = torch.randint(3, 90, (8, 24), generator=torch.Generator().manual_seed(1))
    calibration = Calibration([{"input_ids": part} for part in ids.split(4)], "text", distill_epochs=1)
    caches = []
    stock = text.forward

    def watch(self, *arguments, **options):
        output = stock(self, *arguments, **options)
        caches.append(output.past_key_values)
        return output

    monkeypatch.setattr(text, "forward", watch)
    plan = make_plan(model, param_ratio=0.6)
    vision = [n for n in plan.ranks if "vis" in n]
    assert vision
    with pytest.warns(UserWarning, match=r"do not reach \d+ of \d+ linears .*vis"):
        allocated = allocate(model, plan, "loss", calibration)
    assert {n: allocated.ranks[n] for n in vision} == {n: plan.ranks[n] for n in vision}

    by_weights, dense = copy.deepcopy(model), seen(model, kind)
    lowrank_ft.convert(by_weights, allocated, method="svd")
    lowrank_ft.convert(model, allocated, calibration=calibration)
    assert {n: m.rank for n, m in lowrank_layers(model)} == allocated.ranks
    assert caches
    assert not any(caches)  # of keys and values: whole sequences need none
    assert not torch.allclose(seen(model, kind), dense, atol=1e-3)
    torch.testing.assert_close(seen(model, kind), seen(by_weights, kind))


def test_the_estimate_looks_at_what_text_reaches():
    """The vision tower comes first by name."""
    model = llava().eval()
    plan = make_plan(model, param_ratio=0.6)
    assert "vision" in next(iter(plan.ranks))
    speed = measure(model, plan, {"input_ids": torch.randint(3, 90, (2, 24))})
    assert speed.backward > 0
    assert speed.activation_bytes > 0
