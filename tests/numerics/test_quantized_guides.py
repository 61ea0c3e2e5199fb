"""Packed guides against float64: what they compute, their gradient, how wrong they are, and that nothing rounds them."""

import copy
import sys

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.guides import attach_guides
from lowrank_ft.errors import ConfigError, MissingPackageError
from lowrank_ft.factorization.solvers import truncated_svd
from lowrank_ft.nn import GuidedLowRankLinear, QuantizedGuideLinear, check_guide_bits, end_guidance
from lowrank_ft.nn.quantized_guide import guide_bytes, guide_label
from lowrank_ft.nn.replace import factorized
from tests.conftest import tiny_llama

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(7, 9), (96, 72)]  # an odd count, and several blocks


def matrix(shape, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(1))


def guided(shape=(96, 72), rank=8):
    """A dense linear whose tail of singular values is a hundredth of its head, as one with a guide."""
    torch.manual_seed(0)
    dense = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        tail = matrix(shape, 0.01)
        dense.weight.copy_(torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) + tail)
    layer = factorized(dense, truncated_svd(dense.weight.detach(), rank))
    return dense, GuidedLowRankLinear.from_lowrank(layer, dense.weight, "residual", 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_product_and_gradient(shape, dtype, tolerance):
    guide = QuantizedGuideLinear(matrix(shape))
    x = matrix((3, 5, shape[1])).to(dtype).requires_grad_()
    upstream = matrix((3, 5, shape[0])).to(dtype)
    y = guide(x)
    assert y.dtype == dtype
    y.backward(upstream)
    w = guide.dense(torch.float64)
    scale = shape[1] ** 0.5
    torch.testing.assert_close(y.double(), x.detach().double() @ w.T, rtol=tolerance, atol=tolerance * scale)
    torch.testing.assert_close(x.grad.double(), upstream.double() @ w, rtol=tolerance, atol=tolerance * scale)
    assert all(p.grad is None and p.dtype == torch.uint8 for p in guide.parameters())


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_the_guided_layer(alpha):
    _, layer = guided()
    layer.set_alpha(alpha)
    x = matrix((4, 72)).double().requires_grad_()
    layer.double()
    packed = layer.guide.dense(torch.float64)
    u, v, b = (p.detach().clone().requires_grad_() for p in (layer.U.weight, layer.V.weight, layer.bias))
    x_ref = x.detach().clone().requires_grad_()
    share = torch.tensor(alpha, dtype=torch.float32).double()
    low = x_ref @ v.T @ u.T
    expected = low + share * x_ref @ packed.T + b
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    upstream = matrix((4, 96)).double()
    actual.backward(upstream)
    expected.backward(upstream)
    for found, wanted in [(x, x_ref), (layer.U.weight, u), (layer.V.weight, v), (layer.bias, b)]:
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-9)


def test_the_error_is_a_share_of_what_is_stored():
    """At alpha 1 it is the dense layer but for rounding: of ``R``, and ``W`` is 30 times larger."""
    dense, layer = guided()
    product = layer.U.weight @ layer.V.weight
    error = (layer.guide.dense() + product - dense.weight).norm()
    assert 0 < error < 0.12 * (dense.weight - product).norm()
    whole = QuantizedGuideLinear(dense.weight)
    assert error < (whole.dense() - dense.weight).norm() / 20


def test_no_cast_touches_the_bytes_or_the_scales():
    guide = QuantizedGuideLinear(matrix((96, 72)))
    before = guide.dense()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(guide)
        assert torch.equal(guide.dense(), before)
    guide.to(torch.device("cpu"), torch.bfloat16)
    assert torch.equal(guide.dense(), before)


def test_bytes_are_few_and_travel_through_safetensors():
    guide, other = QuantizedGuideLinear(matrix((96, 72))), QuantizedGuideLinear(matrix((96, 72), 3.0))
    assert sum(p.nbytes for p in guide.parameters()) == guide_bytes((96, 72)) <= 96 * 72 * 4.5 / 8
    state = load(save(guide.state_dict()))
    assert not torch.equal(guide.dense(), other.dense())
    other.load_state_dict(state)
    assert torch.equal(guide.dense(), other.dense())


def test_the_graph_keeps_the_packed_guide_only():
    guide = QuantizedGuideLinear(matrix((96, 72)))
    x = matrix((2, 72)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = guide(x)
    own = {p.data_ptr() for p in guide.parameters()}
    assert own <= {t.data_ptr() for t in saved}
    assert {t.data_ptr() for t in saved} <= own
    y.sum().backward()
    assert x.grad is not None


def test_autocast_decides_the_dtype():
    guide = QuantizedGuideLinear(matrix((96, 72)))
    x = matrix((2, 72)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = guide(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_one_graph_for_all_alphas():
    _, layer = guided()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = matrix((4, 72))
    for alpha in (1.0, 0.5, 0.1):
        layer.set_alpha(alpha)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


def test_convert_and_attach_guides_and_the_end():
    model, dense = tiny_llama(), tiny_llama()
    twin = copy.deepcopy(dense)
    convert(model, rank=8, guide="residual", guide_bits=4)
    convert(twin, rank=8)
    attach_guides(twin, dense, "residual", 4)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer.guide, QuantizedGuideLinear)
    assert guide_label(layer) == "residual in 4 bits"
    assert torch.equal(layer.guide.dense(), twin.model.layers[0].mlp.up_proj.guide.dense())
    ids = torch.arange(3, 20)[None]
    apart = (model(ids).logits - dense(ids).logits).norm() / dense(ids).logits.norm()
    assert apart < 0.15
    expected = sum(guide_bytes((m.out_features, m.in_features)) for m in model.modules() if hasattr(m, "drop_guide"))
    assert end_guidance(model) == expected
    assert not any(p.dtype == torch.uint8 for p in model.parameters())


@pytest.mark.parametrize(
    ("guide", "bits", "words"),
    [
        ("residual", 8, "it must be 4, or left out"),
        ("dense", 4, "a dense guide is trained"),
        (None, 4, "there is no guide to store"),
    ],
)
def test_bits_that_cannot_be(guide, bits, words):
    with pytest.raises(ConfigError, match=words):
        convert(tiny_llama(), rank=8, guide=guide, guide_bits=bits)


def test_a_device_that_lacks_the_mode_is_refused_before_anything_is_converted(monkeypatch):
    def lacking(*_, **__):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(functional, "quantize_4bit", lacking)
    model = tiny_llama()
    with pytest.raises(ConfigError, match=r"on the device cpu \(no kernel for this device\); leave it out"):
        convert(model, rank=8, guide="residual", guide_bits=4)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_without_bitsandbytes_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match=r"pip install lowrank-ft\[quantized\]"):
        check_guide_bits("residual", 4, "cpu")
    check_guide_bits("residual", None, "cpu")
