"""Pivoted factors against the product that they came from, in float64, and the layer's forward and gradients."""

import pytest
import torch
from torch import nn

from lowrank_ft.errors import ConfigError
from lowrank_ft.factorization.pivoting import BOUND, SIDES, Pivoted, pivot, pivot_side, rounded, unpivot, whole
from lowrank_ft.factorization.solvers import Factors, truncated_svd
from lowrank_ft.nn.forms import FORMS, layer_factors, pivoted, plain, stored_as, unpivot_layers
from lowrank_ft.nn.lowrank_linear import LowRankLinear, lowrank_layers
from tests.conftest import tiny_gpt2, tiny_llama

SHAPES = [(24, 40, 9), (40, 24, 9), (32, 32, 31), (5, 7, 1), (300, 200, 120)]


def factors_for(kind, shape):
    torch.manual_seed(7)
    out_features, in_features, rank = shape
    u, v = torch.randn(out_features, rank).double(), torch.randn(rank, in_features).double()
    if kind == "repeated rows":
        u[1::2] = u[: len(u[1::2])].clone()
        v[:, 1::2] = v[:, : v[:, 1::2].shape[1]].clone()
    elif kind == "zero rows":
        u[::2], v[:, ::2] = 0, 0
    elif kind == "rows of any size":
        u *= torch.logspace(-8, 8, out_features).double()[:, None]
        v *= torch.logspace(8, -8, in_features).double()
    elif kind == "rank below r":
        low = max(1, rank // 2)
        u = u[:, :low] @ torch.randn(low, rank).double()
    elif kind == "one huge row":
        u[0] *= 1e8
        v[:, -1] *= 1e8
    elif kind == "all zero":
        u *= 0
    return Factors(u, v)


KINDS = ["random", "repeated rows", "zero rows", "rows of any size", "rank below r", "one huge row", "all zero"]


def naive(form: Pivoted) -> torch.Tensor:
    """Entry by entry from the definition."""
    rank = form.V.shape[0]
    if form.side == "output":
        rows = torch.cat([form.V, form.U @ form.V])
        return torch.stack([rows[int(k)] for k in form.order])
    taken, others = form.U, form.U @ form.V
    product = torch.empty(len(form.U), len(form.order), dtype=form.U.dtype)
    for place, column in enumerate(form.order.tolist()):
        product[:, column] = taken[:, place] if place < rank else others[:, place - rank]
    return product


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_the_same_and_no_coefficient_is_large(shape, kind, side):
    factors = factors_for(kind, shape)
    out_features, in_features, rank = shape
    product = factors.U @ factors.V
    form = pivot(factors, side)
    coefficients = form.U if side == "output" else form.V
    assert form.U.shape == ((out_features - rank if side == "output" else out_features), rank)
    assert form.V.shape == (rank, in_features - rank if side == "input" else in_features)
    assert form.U.numel() + form.V.numel() == rank * (out_features + in_features - rank)
    assert sorted(form.order.tolist()) == list(range(out_features if side == "output" else in_features))
    assert coefficients.abs().max() <= BOUND
    for found in (naive(form), torch.linalg.multi_dot(list(whole(form)))
                  if rank > 1 else whole(form).U @ whole(form).V, unpivot(form).U @ unpivot(form).V):  # fmt: skip
        assert (found - product).norm() <= 1e-12 * product.norm()


def test_unpivoted_factors_are_balanced():
    u, v = unpivot(pivot(factors_for("random", (40, 24, 9))))
    torch.testing.assert_close(u.T @ u, v @ v.T)
    assert (u.T @ u - torch.diag((u.T @ u).diagonal())).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_computed_in_float64_and_given_in_float32(dtype):
    factors = Factors(*(f.to(dtype) for f in factors_for("random", (40, 24, 9))))
    form = pivot(factors)
    assert form.U.dtype == form.V.dtype == torch.float32
    product = factors.U.double() @ factors.V.double()
    assert (naive(form).double() - product).norm() <= 1e-6 * product.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_rounding_is_never_worse_than_that_of_every_entry(kind, side):
    factors = factors_for(kind, (60, 80, 30))
    product, form = factors.U @ factors.V, pivot(factors, side)
    for dtype in (torch.bfloat16, torch.float16):
        if dtype == torch.float16 and kind in ("one huge row", "rows of any size"):
            continue  # out of its range
        stored = rounded(form, dtype)
        entrywise = form._replace(U=form.U.to(dtype), V=form.V.to(dtype))
        found, other = (
            (naive(s._replace(U=s.U.double(), V=s.V.double())) - product).norm() for s in (stored, entrywise)
        )
        assert torch.isfinite(stored.U).all()
        assert torch.isfinite(stored.V).all()
        assert found <= 1.01 * other


def test_in_bfloat16_it_loses_about_as_much_as_plain_factors():
    torch.manual_seed(0)
    weight = torch.randn(256, 256) @ torch.diag(0.97 ** torch.arange(256.0)) @ torch.randn(256, 256)
    factors = truncated_svd(weight, 96)
    product = factors.U.double() @ factors.V.double()
    plain_loss = (factors.U.bfloat16().double() @ factors.V.bfloat16().double() - product).norm()
    form = pivot(factors)
    entrywise = form._replace(U=form.U.bfloat16(), V=form.V.bfloat16())
    losses = []
    for stored in (entrywise, rounded(form, torch.bfloat16)):
        assert stored.U.dtype == stored.V.dtype == torch.bfloat16
        losses.append((naive(stored._replace(U=stored.U.double(), V=stored.V.double())) - product).norm())
    assert losses[1] <= 1.5 * plain_loss
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("shape", "rank", "side"),
    [((8, 16), 4, "output"), ((16, 8), 4, "input"), ((8, 8), 4, "input"), ((8, 16), 8, "input"), ((8, 8), 8, None)],
)
def test_the_shorter_side_is_pivoted(shape, rank, side):
    assert pivot_side(shape, rank) == side


def test_a_side_that_is_no_longer_than_the_rank_is_refused():
    factors = factors_for("random", (4, 9, 4))
    assert pivot(factors).side == "input"
    with pytest.raises(ConfigError, match="side of a 4 x 9 product of rank 4"):
        pivot(factors, "output")
    with pytest.raises(ValueError, match="has no form with pivot 'output'"):
        LowRankLinear(9, 4, 4, pivot="output")
    with pytest.raises(ValueError, match="has no form with pivot 'both'"):
        LowRankLinear(9, 4, 2, pivot="both")


def layer_of(side, shape=(24, 40, 9), transposed=False):
    out_features, in_features, rank = shape
    factors = factors_for("random", shape)
    layer = LowRankLinear(in_features, out_features, rank, transposed=transposed, dtype=torch.float64)
    layer.U.weight, layer.V.weight = nn.Parameter(factors.U), nn.Parameter(factors.V)
    nn.init.normal_(layer.bias)
    if side is None:
        return layer, factors.U @ factors.V
    form = pivot(factors, side)
    made = LowRankLinear(in_features, out_features, rank, transposed=transposed, dtype=torch.float64, pivot=side)
    made.U.weight, made.V.weight, made.order = nn.Parameter(form.U), nn.Parameter(form.V), form.order
    made.bias = layer.bias
    return made, factors.U @ factors.V


@pytest.mark.parametrize("side", [None, *SIDES])
def test_forward_and_gradients_are_those_of_the_naive_product(side):
    layer, product = layer_of(side)
    x = torch.randn(3, 5, 40, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    u, v = layer.U.weight.detach().clone().requires_grad_(), layer.V.weight.detach().clone().requires_grad_()
    w = u @ v if side is None else naive(Pivoted(u, v, layer.order, side))
    bias = layer.bias.detach().clone().requires_grad_()
    torch.testing.assert_close(w.detach(), product)
    y, expected = layer(x), torch.einsum("bti,oi->bto", x2, w) + bias
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for found, wanted in ((x, x2), (layer.U.weight, u), (layer.V.weight, v), (layer.bias, bias)):
        torch.testing.assert_close(found.grad, wanted.grad)


@pytest.mark.parametrize("side", SIDES)
def test_autocast_meta_casts_and_state_dicts(side):
    layer, _ = layer_of(side)
    layer = layer.float()
    x = torch.randn(4, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    half = layer_of(side)[0].to(torch.bfloat16)
    assert (half.U.weight.dtype, half.order.dtype) == (torch.bfloat16, torch.int32)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    copy = LowRankLinear(40, 24, 9, pivot=side)
    assert list(copy.state_dict()) == ["bias", "order", "weight", "V.weight", "U.weight"]
    copy.load_state_dict(layer.state_dict())
    assert torch.equal(copy(x), layer(x))
    assert LowRankLinear(40, 24, 9, pivot=side, device="meta")(x.to("meta")).shape == (4, 24)
    assert layer.numbers == layer.U.weight.numel() + layer.V.weight.numel()


@pytest.mark.parametrize("side", SIDES)
def test_it_compiles_without_graph_breaks(side):
    layer, _ = layer_of(side)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(4, 40, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))


def test_layers_change_their_form_and_back():
    for transposed in (False, True):
        layer, product = layer_of(None, transposed=transposed)
        stored = pivoted(layer)
        assert (stored.pivot, stored.transposed) == ("output", transposed)
        assert stored.bias is layer.bias
        again = plain(stored)
        for one in (layer, stored, again):
            u, v = layer_factors(one)
            torch.testing.assert_close(u @ v, product)
        assert plain(layer) is layer
        assert pivoted(stored) is stored


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_model_is_stored_in_one_form_and_stays_in_another(make, ids):
    import lowrank_ft

    model = make()
    lowrank_ft.convert(model, rank=8)
    before, wanted = dict(lowrank_layers(model)), model(ids).logits
    for form in FORMS:
        with stored_as(model, form):
            assert all((m.pivot is None) == (form == "factors") for _, m in lowrank_layers(model))
            torch.testing.assert_close(model(ids).logits, wanted)
        assert dict(lowrank_layers(model)) == before
    with pytest.raises(ConfigError, match="form 'both'"), stored_as(model, "both"):
        pass
    with pytest.raises(RuntimeError), stored_as(model, "pivoted"):
        raise RuntimeError
    assert dict(lowrank_layers(model)) == before
    assert unpivot_layers(model) == 0


def test_training_the_pivoted_form_warns_unless_its_factors_are_frozen():
    layer, _ = layer_of("output")
    layer.eval()
    with pytest.warns(UserWarning, match=r"call\s+lowrank_ft.unpivot\(model\) before the optimizer is made"):
        layer.train()
    layer.eval().requires_grad_(False)
    layer.train()
    layer_of(None)[0].eval().train()


def test_a_layer_that_cannot_be_changed_leaves_the_model_as_it_was(monkeypatch):
    import lowrank_ft
    from lowrank_ft.nn import forms

    model = tiny_llama()
    lowrank_ft.convert(model, rank=8)
    before = dict(lowrank_layers(model))
    made = []

    def fails_at_the_third(layer, dtype=None):
        if len(made) == 2:
            raise MemoryError
        made.append(pivoted(layer, dtype))
        return made[-1]

    monkeypatch.setattr(forms, "pivoted", fails_at_the_third)
    with pytest.raises(MemoryError), stored_as(model, "pivoted"):
        pass
    assert dict(lowrank_layers(model)) == before
