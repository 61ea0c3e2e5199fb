"""The part of the vLLM plugin that needs no vLLM: what is planned, how pieces are filled and cut, what is refused."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from lowrank_ft.checkpoints.loader import NEWEST_READABLE_FORMAT
from lowrank_ft.errors import CheckpointError
from lowrank_ft.integrations.vllm import register
from lowrank_ft.integrations.vllm.entry import check_entry, refuse_transposed
from lowrank_ft.integrations.vllm.pieces import Stored, plain_product
from lowrank_ft.integrations.vllm.plan import Piece, Split, part_names, plan_layer
from lowrank_ft.nn import LowRankLinear
from lowrank_ft.nn.forms import pivoted
from tests.conftest import ROOT

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
IN, OUT, RANK = 24, 16, 6


def layer(side: str | None, out_features: int = OUT, in_features: int = IN, rank: int = RANK) -> LowRankLinear:
    """A random factored layer, float64."""
    torch.manual_seed(0)
    made = LowRankLinear(in_features, out_features, rank, bias=False, dtype=torch.float64, pivot=side)
    for part in (made.U, made.V):
        nn.init.normal_(part.weight)
    if side:
        made.order = torch.randperm(len(made.order)).int()
    return made.eval()


def stored(piece: Piece, source: LowRankLinear | nn.Linear) -> Stored:
    made = Stored(piece, torch.float64)
    if isinstance(source, LowRankLinear):
        made.load("U", source.U.weight.detach())
        made.load("V", source.V.weight.detach())
        made.load("weight", source.weight)  # the tripwire
        if source.pivot:
            made.load("order", source.order)
    else:
        made.load("weight", source.weight.detach())
    assert made.filled
    assert not made.missing()
    return made


def plan(prefix: str, ranks: dict[str, int], pivots: dict[str, str], split: Split) -> list[Piece]:
    pieces = plan_layer(prefix, ranks, pivots, PACKED, split)
    assert pieces is not None
    return pieces


def test_packed_names():
    assert part_names("model.layers.3.self_attn.qkv_proj", PACKED) == [
        f"model.layers.3.self_attn.{n}_proj" for n in "qkv"
    ]
    assert part_names("lm.down_proj", PACKED) == ["lm.down_proj"]
    assert part_names("down_proj", PACKED) == ["down_proj"]


def test_a_packed_linear_has_ranks_forms_and_dense_parts():
    split = Split((16, 8, 8), 24, 24, size=1)
    pieces = plan("a.qkv_proj", {"a.q_proj": 6, "a.k_proj": 2}, {"a.q_proj": "input"}, split)
    assert [(p.name, p.rank, p.pivot, p.shape) for p in pieces] == [
        ("a.q_proj", 6, "input", (16, 24)),
        ("a.k_proj", 2, None, (8, 24)),
        ("a.v_proj", None, None, (8, 24)),
    ]
    assert plan_layer("a.qkv_proj", {"b.q_proj": 6}, {}, PACKED, split) is None


def test_heads_that_processes_share_are_found():
    split = Split((8, 4, 4), 24, 24, size=4, rank=3, replicas=(1, 2, 2))
    assert [(p.shape[0], p.rows) for p in plan("qkv_proj", {"q_proj": 2}, {}, split)] == [
        (32, ((24, 8),)),
        (8, ((4, 4),)),
        (8, ((4, 4),)),
    ]


def test_one_pair_of_factors_for_a_packed_linear():
    rows = [
        plan("qkv_proj", {"qkv_proj": 4}, {}, Split((8, 4, 4), 24, 24, size=2, rank=r, replicas=(1, 1, 1)))[0].rows
        for r in (0, 1)
    ]
    assert rows == [((0, 8), (16, 4), (24, 4)), ((8, 8), (20, 4), (28, 4))]
    (whole,) = plan("qkv_proj", {"qkv_proj": 4}, {"qkv_proj": "output"}, Split((8, 4, 4), 24, 24))
    assert whole.local_pivot == "output"


@pytest.mark.parametrize(
    ("prefix", "ranks", "pivots", "outputs", "said"),
    [
        ("qkv_proj", {"qkv_proj": 2, "k_proj": 2}, {}, (8, 4, 4), "ranks for qkv_proj and for k_proj, a part of it"),
        ("qkv_proj", {"k_proj": 2}, {}, (8, 4), "has 2 parts in this vLLM, and its model class names 3"),
        ("down_proj", {"down_proj": 9}, {}, (8,), "rank 9 and pivot None for down_proj, which is 8 x 24"),
        ("down_proj", {"down_proj": 8}, {"down_proj": "output"}, (8,), "rank 8 and pivot output for down_proj"),
        ("down_proj", {"down_proj": 4}, {"down_proj": "both"}, (8,), "pivot both"),
    ],
)
def test_contradictions_are_one_line(prefix, ranks, pivots, outputs, said):
    with pytest.raises(CheckpointError) as caught:
        plan_layer(prefix, ranks, pivots, PACKED, Split(outputs, 24, 24))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("side", [None, "output", "input"])
def test_a_whole_piece_computes_what_the_layer_computes(side):
    source, x = layer(side), torch.randn(3, IN, dtype=torch.float64)
    (piece,) = plan("o_proj", {"o_proj": RANK}, {"o_proj": side} if side else {}, Split((OUT,), IN, IN))
    made = stored(piece, source)
    assert piece.local_pivot == side  # the few numbers of the stored form are those that are held
    assert sum(m.weight.numel() for m in made.matrices.values()) == source.numbers
    torch.testing.assert_close(made(x), source(x), rtol=0, atol=0)


@pytest.mark.parametrize("side", [None, "output", "input"])
def test_outputs_are_split(side):
    source, x = layer(side), torch.randn(3, IN, dtype=torch.float64)
    parts: list[Tensor] = []
    for rank in range(2):
        split = Split((OUT // 2,), IN, IN, size=2, rank=rank)
        (piece,) = plan("up", {"up": RANK}, {"up": side} if side else {}, split)
        assert piece.local_pivot == (side if side == "input" else None)
        parts.append(stored(piece, source)(x))
    torch.testing.assert_close(torch.cat(parts, dim=-1), source(x))


@pytest.mark.parametrize("side", [None, "output", "input"])
def test_inputs_are_split_and_the_middle_is_summed(side):
    source, x = layer(side), torch.randn(3, IN, dtype=torch.float64)
    made = []
    for rank in range(2):
        split = Split((OUT,), IN // 2, IN, input_rank=rank)
        (piece,) = plan("down", {"down": RANK}, {"down": side} if side else {}, split)
        assert piece.local_pivot == (side if side == "output" else None)
        made.append(stored(piece, source))
    own = [x[:, : IN // 2], x[:, IN // 2 :]]
    middles = [s.middle(part, plain_product) for s, part in zip(made, own, strict=True)]
    assert middles[0].shape == (3, RANK)
    torch.testing.assert_close(made[1].outputs(sum(middles), plain_product), source(x))
    # A model that sums later itself gets the same from the sum of both outputs.
    torch.testing.assert_close(made[0](own[0]) + made[1](own[1]), source(x))


def test_rows_of_one_pair_of_factors_that_is_split():
    source, x = layer("output", 32), torch.randn(3, IN, dtype=torch.float64)
    whole = source(x)
    for rank, rows in enumerate(
        ([*range(8), *range(16, 20), *range(24, 28)], [*range(8, 16), *range(20, 24), *range(28, 32)])
    ):
        split = Split((8, 4, 4), IN, IN, size=2, rank=rank, replicas=(1, 1, 1))
        (piece,) = plan("qkv_proj", {"qkv_proj": RANK}, {"qkv_proj": "output"}, split)
        torch.testing.assert_close(stored(piece, source)(x), whole[:, rows])


def test_a_dense_part_is_cut():
    source, x = nn.Linear(IN, OUT, bias=False, dtype=torch.float64), torch.randn(3, IN, dtype=torch.float64)
    split = Split((OUT // 2, OUT // 2), IN, IN, size=2, rank=1)
    gate, up = plan("gate_up_proj", {"gate_proj": RANK}, {}, split)
    assert gate.rank == RANK
    torch.testing.assert_close(stored(up, source)(x), source(x)[:, OUT // 2 :])


def test_what_the_package_pivots_is_served_as_it_is():
    source = pivoted(layer(None))
    (piece,) = plan("up", {"up": RANK}, {"up": source.pivot}, Split((OUT,), IN, IN))
    x = torch.randn(2, IN, dtype=torch.float64)
    torch.testing.assert_close(stored(piece, source)(x), layer(None)(x))


def test_a_tensor_of_another_shape_is_named():
    (piece,) = plan("a.up", {"a.up": RANK}, {}, Split((OUT,), IN, IN))
    made = Stored(piece, torch.float32)
    with pytest.raises(
        CheckpointError, match=r"a\.up\.U\.weight has shape \(6, 16\).*of rank 6 and pivot None, with \(16, 6\)"
    ):
        made.load("U", torch.zeros(RANK, OUT))
    with pytest.raises(CheckpointError, match=r"a\.up\.weight has shape \(16, 24\).*no such tensor"):
        made.load("weight", torch.zeros(OUT, IN))
    with pytest.raises(CheckpointError, match=r"a\.up\.order"):
        made.load("order", torch.zeros(OUT, dtype=torch.int32))
    assert made.missing() == ["U", "V"]


def test_the_tripwire_is_no_dense_weight():
    (_, dense) = plan("gate_up_proj", {"gate_proj": RANK}, {}, Split((OUT, OUT), IN, IN))
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \(1,\)"):
        Stored(dense, torch.float32).load("weight", torch.zeros(1))


def test_what_cannot_be_served_is_said():
    check_entry({"quant_method": "lowrank", "format_version": 2, "ranks": {}, "pivots": {}, "base_model": "x"})
    with pytest.raises(
        CheckpointError, match=f"format version 99, and this code reads up to {NEWEST_READABLE_FORMAT};"
    ):
        check_entry({"quant_method": "lowrank", "format_version": 99})
    with pytest.raises(CheckpointError, match="has 'bits', which the vLLM plugin does not know"):
        check_entry({"quant_method": "lowrank", "format_version": 2, "bits": 4})
    refuse_transposed("llama", {"a": 1})
    with pytest.raises(
        CheckpointError, match=r"factored h\.0\.c_fc: vLLM transposes the linears of gpt2.*lowrank-ft merge"
    ):
        refuse_transposed("gpt2", {"h.0.c_fc": 1})


def test_vllm_is_imported_by_nobody_but_vllm():
    code = "import sys, lowrank_ft, lowrank_ft.integrations.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_entry_point_is_there():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'entry-points."vllm.general_plugins"\]\nlowrank = "([\w.]+):(\w+)"', text)
    assert found is not None
    assert getattr(import_module(found[1]), found[2]) is register
