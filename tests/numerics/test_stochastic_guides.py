"""Stochastic guidance against the formulas in float64, with and without activations that are computed twice."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from lowrank_ft.conversion.convert import convert
from lowrank_ft.factorization.solvers import truncated_svd
from lowrank_ft.integrations.peft import LowRankConfig
from lowrank_ft.nn import GUIDES, GuidedLowRankLinear, end_guidance, guided_layers, set_alpha, set_gates
from lowrank_ft.nn.replace import dense_weight, factorized
from lowrank_ft.schedule import keeps_guide
from tests.conftest import tiny_llama

SEED, LAYERS = 11, 6


def make(kind):
    """Guided layers in a row, factors away from where they started."""
    torch.manual_seed(0)
    layers = []
    for _ in range(LAYERS):
        dense = nn.Linear(9, 9).double()
        weight = dense_weight(dense)
        layer = GuidedLowRankLinear.from_lowrank(factorized(dense, truncated_svd(weight, 3)), weight, kind)
        with torch.no_grad():
            layer.U.weight.add_(0.1 * torch.randn_like(layer.U.weight))
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers)


def reference(model, x, kind, alpha, kept):
    """The formulas of the guide's documentation, matrix by matrix; also the leaves, named as in the model."""
    leaves = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in model.named_parameters()}
    for i, keep in enumerate(kept):
        u, v, g, b = (leaves[f"{2 * i}.{n}"] for n in ("U.weight", "V.weight", "guide.weight", "bias"))
        factors = x @ v.T @ u.T
        if not keep:
            y = factors
        elif kind == "residual":
            y = factors + alpha * (x @ g.T)
        else:
            y = alpha * (x @ g.T) + (1 - alpha) * factors
        x = torch.tanh(y + b)
    return x, leaves


@pytest.mark.parametrize("alpha", [1.0, 0.625, 0.25])  # exact in float32, as alpha is
@pytest.mark.parametrize("kind", GUIDES)
def test_forward_and_gradients_are_those_of_the_kept_guides(kind, alpha):
    model = make(kind)
    set_alpha(model, alpha)
    patterns = set()
    for step in range(5):
        kept = [keeps_guide(SEED, step, i, alpha) for i in range(LAYERS)]
        patterns.add(tuple(kept))
        assert set_gates(model, step, alpha, SEED) == sum(kept)
        x = torch.randn(4, 9, dtype=torch.float64)
        expected, leaves = reference(model, x, kind, alpha, kept)
        model.zero_grad()
        actual = model(x)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(actual)
        actual.backward(upstream)
        expected.backward(upstream)
        for name, parameter in model.named_parameters():
            if leaves[name].grad is None:  # not trained, or left out: no gradient at all, so that AdamW skips it
                assert parameter.grad is None, name
            else:
                torch.testing.assert_close(parameter.grad, leaves[name].grad, rtol=1e-11, atol=1e-12)
        assert kind != "dense" or [layer.guide.weight.grad is not None for _, layer in guided_layers(model)] == kept
    assert len(patterns) == 1 if alpha == 1 else len(patterns) > 3


@pytest.mark.parametrize("kind", GUIDES)
def test_a_guide_that_is_left_out_computes_nothing_and_the_mean_share_is_alpha_squared(kind):
    layer, alpha, x = make(kind)[0], 0.5, torch.randn(4, 9, dtype=torch.float64)
    calls = []
    layer.guide.register_forward_hook(lambda *_: calls.append(1))
    layer.set_alpha(alpha)
    outputs, kept = [], 0
    for step in range(400):
        kept += set_gates(layer, step, alpha, SEED)
        outputs.append(layer(x))
        assert len(calls) == kept
    frequency = kept / 400
    assert frequency == pytest.approx(alpha, abs=0.1)
    factors = x @ layer.V.weight.T @ layer.U.weight.T + layer.bias
    guide = x @ layer.guide.weight.T
    share = alpha * frequency  # in expectation alpha^2
    expected = factors + share * (guide if kind == "residual" else guide + layer.bias - factors)
    torch.testing.assert_close(torch.stack(outputs).mean(0), expected, rtol=1e-10, atol=1e-10)


def grads(model, ids):
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss, {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", GUIDES)
def test_gradient_checkpointing_computes_the_same_guides_again(kind, ids):
    """In float64: the same loss, the same gradients, and a kept guide runs twice where one that is left out never does."""
    model = tiny_llama()
    convert(model, rank=8, guide=kind)
    check_checkpointing(model.double().train(), ids, {n: layer.guide for n, layer in guided_layers(model)})


def test_gradient_checkpointing_of_a_peft_adapter(ids):
    model = get_peft_model(tiny_llama().double(), LowRankConfig(r=8, guide="residual", alpha=1.0)).double().train()
    check_checkpointing(model, ids, {})


def check_checkpointing(model, ids, guides):
    calls = dict.fromkeys(guides, 0)
    for name, guide in guides.items():
        guide.register_forward_hook(lambda *_, n=name: calls.update({n: calls[n] + 1}))
    alpha = 0.5
    set_alpha(model, alpha)
    for step in (1, 2):
        kept = set_gates(model, step, alpha, SEED)
        assert 0 < kept < 14
        model.gradient_checkpointing_disable()
        plain, expected = grads(model, ids)
        once = calls.copy()
        calls.update(dict.fromkeys(calls, 0))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again, found = grads(model, ids)
        assert torch.equal(plain, again)
        assert sum(once.values()) == (kept if guides else 0)
        assert calls == {n: 2 * count for n, count in once.items()}
        assert any(g is not None for g in expected.values())
        for name, gradient in expected.items():
            assert (gradient is None) == (found[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient, rtol=1e-12, atol=1e-14)
        calls.update(dict.fromkeys(calls, 0))


def test_a_peft_adapter_is_gated_likewise(ids):
    """With its gate closed a layer is what it is at alpha 0; merging and saving look at alpha, not at the gate."""
    model = get_peft_model(tiny_llama(), LowRankConfig(r=8, guide="residual", alpha=0.5)).eval()
    layers = [layer for _, layer in guided_layers(model)]
    x = torch.randn(3, layers[0].in_features)
    set_alpha(model, 0.0)
    compact = layers[0](x)
    set_alpha(model, 0.5)
    guided, merged = layers[0](x), layers[0].effective_weight(["default"])
    for step in range(6):
        kept = set_gates(model, step, 0.5, SEED)
        assert kept == sum(keeps_guide(SEED, step, i, 0.5) for i in range(len(layers)))
        expected = guided if keeps_guide(SEED, step, 0, 0.5) else compact
        torch.testing.assert_close(layers[0](x), expected)
        assert torch.equal(layers[0].effective_weight(["default"]), merged)
    assert not torch.equal(guided, compact)
    layers[0].guide_gate = False
    end_guidance(model)
    assert all(layer.guide_gate for layer in layers)
