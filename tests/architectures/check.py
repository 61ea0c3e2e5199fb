"""What is done with every architecture, and what the page of the documentation says about it."""

import json
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowrank_ft
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.remainder import dense_parts, factored_share
from lowrank_ft.nn import lowrank_layers, stored_form
from lowrank_ft.nn.forms import stored_as
from tests.architectures.row import Row

RATIO = 0.6
RESULTS = Path(__file__).with_name("results.json")
_REFUSALS = (
    "has none of the factored linears", "has no weights for",  # this package's
    "head next to its weights", "requires config.out_indices",  # of classes that want more than any checkpoint here has
)  # fmt: skip
LEAST = 0.01  # share of the parameters below which a reason is not worth a word


@dataclass(frozen=True)
class Result:
    """What the page says of one row.

    Attributes:
        cls, model_type: of the model.
        parameters: of a model of the default config.
        factored: share of its linears' and experts' parameters that the default targets cover.
        dense: reason to share of the parameters of that model.
        loads: names of the Auto classes that load the tiny checkpoint with every weight of its body.
    """

    cls: str
    model_type: str
    parameters: int
    factored: float
    dense: dict[str, float]
    loads: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def stored_results() -> dict[str, Any]:
    """What ``python -m tests.architectures.measure`` wrote: results by class, and the version of transformers."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found | {"rows": {r["cls"]: Result(**r) for group in found["groups"].values() for r in group}}


def check_and_compare(row: Row, folder: Path) -> None:
    """As :func:`check`; the result must be what the page of the documentation says."""
    if row.missing:
        pytest.skip(f"transformers {transformers.__version__} has no {row.missing}")
    result, stored = check(row, folder), stored_results()
    if stored["transformers"] == transformers.__version__:  # others may have other classes
        assert result == stored["rows"].get(row.cls), "run python -m tests.architectures.measure"


def check(row: Row, folder: Path) -> Result:
    """Convert, save, load, merge, load again, train: raises an AssertionError where something is not as it was."""
    began = time.process_time()
    dense = row.build()
    plan = make_plan(row.build(on="meta"), param_ratio=RATIO)
    assert plan == make_plan(dense, param_ratio=RATIO)
    assert len(plan.ranks) >= 4
    _train_a_step(row)
    lowrank_ft.convert(dense, plan, method="svd")
    compact, merged = folder / "compact", folder / "merged"
    save_compact(dense, compact)
    cls: Any = type(dense)
    loaded, info = cls.from_pretrained(compact, output_loading_info=True)
    assert not any(info.values()), info
    assert stored_form(loaded)[0] == plan.ranks
    with torch.no_grad(), stored_as(dense, "pivoted"):
        expected, weights = _outputs(dense, row), dense.state_dict()
    read = loaded.state_dict()
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in weights.items())
    _assert_close(_outputs(loaded, row), expected, 1e-6)
    loaded.save_pretrained(folder / "again")
    again, info = cls.from_pretrained(folder / "again", output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    loads = _auto_classes(dense, weights, compact)
    lowrank_ft.merge(loaded)
    assert not stored_form(loaded)[0]
    loaded.save_pretrained(merged)
    again, info = cls.from_pretrained(merged, output_loading_info=True)
    assert not any(info.values()), info
    _assert_close(_outputs(again, row), expected, 2e-4)
    result = _described(row, loads)
    print(f"{row.cls}: {time.process_time() - began:.1f} s of one thread")
    return result


def _outputs(model: Any, row: Row) -> torch.Tensor:
    with torch.no_grad():
        return model(**row.inputs())[0]


def _assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    # Not to the bit: kernels may round differently where a file's mapping aligns a weight differently.
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-5 if tolerance < 1e-5 else 1e-3)


def _train_a_step(row: Row) -> None:
    """One guided step: finite loss, and all factors that the inputs reach are moved."""
    model: Any = row.build()
    dense = _outputs(model, row)
    lowrank_ft.convert(model, param_ratio=RATIO, method="svd", guide="residual")
    _assert_close(_outputs(model, row), dense, 2e-4)  # with the whole guide it is the dense model
    lowrank_ft.set_alpha(model, 0.5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    before = {name: layer.U.weight.detach().clone() for name, layer in lowrank_layers(model)}
    loss = model(**row.inputs())[0].float().square().mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = {name for name, layer in lowrank_layers(model) if not torch.equal(layer.U.weight, before[name])}
    for name in before.keys() - moved:  # an expert that got no token, beside others that did
        stack = name.rpartition(".")[0]
        if name.rpartition(".")[2].isdigit() and any(m.rpartition(".")[0] == stack for m in moved):
            moved.add(name)
    still = {name for name in before.keys() - moved if not name.startswith(row.unreached or ("?",))}
    assert moved
    assert not still, f"not trained: {sorted(still)}"
    assert lowrank_ft.end_guidance(model) > 0
    model.eval()
    assert torch.isfinite(_outputs(model, row)).all()


@cache
def _all_auto_classes() -> dict[str, Any]:
    classes = {n: getattr(transformers, n) for n in sorted(dir(transformers)) if n.startswith("AutoModel")}
    return {name: auto for name, auto in classes.items() if getattr(auto, "_model_mapping", None) is not None}


def _auto_classes(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """Those that load the folder; each of them must have all the weights that it shares with ``model``."""
    found = []
    for name, auto in _all_auto_classes().items():
        if type(model.config) not in auto._model_mapping:
            continue
        refusal = ""
        try:
            loaded = auto.from_pretrained(folder)
        except ValueError as error:
            refusal = str(error)
        if refusal:  # and not random factors
            assert any(words in refusal for words in _REFUSALS), (name, refusal)
            continue
        _assert_same_factors(loaded, weights, name)
        found.append(name)
    return found


def _assert_same_factors(loaded: Any, weights: dict[str, torch.Tensor], name: str) -> None:
    """Every factor is that of the checkpoint, whatever comes before its name in this class."""
    factors = [k for k in loaded.state_dict() if k.endswith((".U.weight", ".U"))]
    assert len(factors) >= len(stored_form(loaded)[0]) > 0, name
    for key in factors:
        tail = key.split(".")
        for depth in range(len(tail)):
            ending = ".".join(tail[depth:])
            same = [w for n, w in weights.items() if n == ending or n.endswith(f".{ending}")]
            if same:
                break
        assert any(torch.equal(loaded.state_dict()[key], w) for w in same), (name, key)


def _described(row: Row, loads: list[str]) -> Result:
    model = row.full_size()
    plan = make_plan(model, param_ratio=RATIO)
    shares: dict[str, float] = {}
    for part in dense_parts(model, plan):
        shares[part.why] = shares.get(part.why, 0.0) + part.parameters / plan.model_parameters
    dense = {why: round(s, 4) for why, s in sorted(shares.items(), key=lambda pair: -pair[1]) if s > LEAST}
    return Result(
        row.cls, model.config.model_type, plan.model_parameters, round(factored_share(model, plan), 4), dense, loads
    )
