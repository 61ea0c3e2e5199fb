"""Guided layers against the formulas in float64: outputs and every gradient, at several alphas."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowrank_ft.factorization.solvers import truncated_svd
from lowrank_ft.nn import GUIDES, GuidedLowRankLinear, compact_view, end_guidance, guided_layers, set_alpha
from lowrank_ft.nn.replace import dense_weight, factorized, merged

ALPHAS = [1.0, 0.7, 0.25, 0.0]


def make(kind, conv=False, bias=True, rank=3):
    torch.manual_seed(0)
    dense = (Conv1D(7, 9) if conv else nn.Linear(9, 7, bias=bias)).double()
    if dense.bias is not None:
        nn.init.normal_(dense.bias)
    weight = dense_weight(dense)
    layer = factorized(dense, truncated_svd(weight, rank))
    return dense, GuidedLowRankLinear.from_lowrank(layer, weight, kind)


def reference(x, w, u, v, bias, kind, alpha, r0):
    """The module docstring, term by term."""
    if kind == "residual":
        y = x @ v.T @ u.T + alpha * (x @ r0.T)
    else:
        y = alpha * (x @ w.T) + (1 - alpha) * (x @ v.T @ u.T)
    return y if bias is None else y + bias


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize(("conv", "bias"), [(False, True), (False, False), (True, True)])
def test_forward_and_gradients(kind, conv, bias, alpha):
    dense, layer = make(kind, conv, bias)
    layer.set_alpha(alpha)
    # Away from the initial factors, so that R and W - U V differ.
    with torch.no_grad():
        layer.U.weight.add_(0.1 * torch.randn_like(layer.U.weight))
    x = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True)
    leaf = {k: p.detach().clone().requires_grad_() for k, p in [("u", layer.U.weight), ("v", layer.V.weight)]}
    w = dense_weight(dense).clone().requires_grad_(kind == "dense")
    # Factors are computed in float32, so R is taken from the layer and checked apart.
    r0 = layer.guide.weight.detach()
    b = None if layer.bias is None else layer.bias.detach().clone().requires_grad_()
    x_ref = x.detach().clone().requires_grad_()
    expected = reference(x_ref, w, leaf["u"], leaf["v"], b, kind, torch.tensor(alpha, dtype=torch.float32).double(), r0)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    actual.backward(upstream)
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.U.weight.grad, leaf["u"].grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.V.weight.grad, leaf["v"].grad, rtol=1e-11, atol=1e-12)
    if b is not None:
        torch.testing.assert_close(layer.bias.grad, b.grad, rtol=1e-11, atol=1e-12)
    if kind == "dense":
        torch.testing.assert_close(layer.guide.weight.grad, w.grad, rtol=1e-11, atol=1e-12)
    else:
        assert layer.guide.weight.grad is None


@pytest.mark.parametrize("kind", GUIDES)
def test_at_alpha_one_it_is_the_dense_layer_and_at_zero_the_compact_one(kind):
    dense, layer = make(kind)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-6)
    layer.set_alpha(0.0)
    with compact_view(layer):
        compact = layer(x)
    torch.testing.assert_close(layer(x), compact, rtol=0, atol=0)
    torch.testing.assert_close(compact, merged(layer)(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", GUIDES)
def test_full_gradient_to_the_factors_at_alpha_one_only_with_a_residual_guide(kind):
    _, layer = make(kind)
    layer(torch.randn(4, 9, dtype=torch.float64)).sum().backward()
    assert bool(layer.U.weight.grad.any()) is (kind == "residual")


def test_the_residual_is_what_the_factors_dropped():
    dense, layer = make("residual")
    product = layer.U.weight.double() @ layer.V.weight.double()
    torch.testing.assert_close(layer.guide.weight + product, dense_weight(dense), rtol=1e-12, atol=1e-12)


def test_casting_keeps_alpha_exact():
    _, layer = make("residual")
    layer.set_alpha(0.123456)
    layer.to(torch.bfloat16)
    assert layer.U.weight.dtype == torch.bfloat16
    assert layer.alpha.dtype == torch.float32
    assert layer.alpha.item() == pytest.approx(0.123456, abs=1e-7)


@pytest.mark.parametrize("kind", GUIDES)
def test_end_guidance_frees_the_guide_and_leaves_the_rest_alone(kind):
    _, first = make(kind)
    model = nn.Sequential(first, nn.Linear(7, 9).double(), make(kind)[1])
    own = [p for n, p in model.named_parameters() if ".guide." not in n]
    guide = [p for n, p in model.named_parameters() if ".guide." in n and p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": own}, {"params": guide}])
    set_alpha(model, 0.5)
    model(torch.randn(4, 9, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    before = {id(p): copy.deepcopy(optimizer.state[p]) for p in own}
    bytes_before = sum(p.nbytes for p in model.parameters())

    freed = end_guidance(model, optimizer)

    assert freed == 2 * 7 * 9 * 8
    assert sum(p.nbytes for p in model.parameters()) == bytes_before - freed
    assert not any(guided_layers(model))
    assert len(optimizer.param_groups) == 2
    assert optimizer.param_groups[1]["params"] == []
    assert set(map(id, optimizer.state)) == set(map(id, own))
    for parameter in own:
        for key, value in before[id(parameter)].items():
            assert torch.equal(optimizer.state[parameter][key], value)
    assert end_guidance(model, optimizer) == 0


def test_the_guide_is_really_garbage_after_the_drop():
    import gc
    import weakref

    _, layer = make("residual")
    reference_to_weight = weakref.ref(layer.guide.weight)
    end_guidance(layer)
    gc.collect()
    assert reference_to_weight() is None


def test_compact_view_skips_the_guide_entirely():
    _, layer = make("residual")
    calls = []
    layer.guide.register_forward_hook(lambda *_: calls.append(1))
    with compact_view(layer):
        layer(torch.randn(1, 9, dtype=torch.float64))
    assert calls == []
    layer(torch.randn(1, 9, dtype=torch.float64))
    assert calls == [1]


def test_torch_compile_does_not_recompile_as_alpha_moves():
    _, layer = make("residual")
    layer.float()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(4, 9)
    outputs = []
    for alpha in ALPHAS:
        layer.set_alpha(alpha)
        outputs.append(compiled(x))
    assert len(graphs) == 1
    assert not torch.equal(outputs[0], outputs[1])
    end_guidance(layer)
    torch.testing.assert_close(compiled(x), outputs[-1])
    assert len(graphs) == 2
