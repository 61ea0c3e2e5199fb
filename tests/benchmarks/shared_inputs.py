"""Does it pay that linears which read the same tensor (q, k and v; gate and up) share one V?

    PYTHONPATH=. python tests/benchmarks/shared_inputs.py --model SMOLLM2

A shared V of rank r with stacked outputs has ``r * (out_1 + out_2 + ... + in - r)`` parameters in the pivoted form. Ranks
are spent by loss, as ``convert`` does it, over units: a linear, or linears that share. The factors of a unit minimize

    sum over its linears l of  g_l^2 |(W_l - U_l V) X|^2        g_l^2: mean squared gradient at the outputs

which for a single linear is what ``convert --effort fast`` minimizes; nothing is trained. *Predicted* is the sum of what is cut
off, in units of loss. Then the products take the place of the weights, and perplexity is measured.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.console import print_table
from lowrank_ft.conversion.batches import read_batches
from lowrank_ft.conversion.calibration import first_batches
from lowrank_ft.conversion.received import dense_moments
from lowrank_ft.conversion.sensitivity import GRADIENT_TOKENS, output_gradients
from lowrank_ft.data.sources import read_rows
from lowrank_ft.factorization.allocation import allocate_ranks
from lowrank_ft.factorization.ranks import factored_parameters
from lowrank_ft.factorization.solvers import Regression, weighted_singular_values
from lowrank_ft.factorization.targets import select_targets
from tests.benchmarks import common

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
VARIANTS = {"separate": (), "q/k/v share": GROUPS[:1], "gate/up share": GROUPS[1:], "both share": GROUPS}


def units_of(names: list[str], shared: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """Linears by what they share a V with."""
    found: dict[str, list[str]] = {}
    for name in names:
        owner, _, last = name.rpartition(".")
        group = next((g for g in shared if last in g), None)
        found.setdefault(name if group is None else f"{owner}.{group[0]}", []).append(name)
    return list(found.values())


class Measured:
    """Weights, moments and gradients of a dense model, and what each unit loses at each rank."""

    def __init__(self, model: Any, batches: list[Any]) -> None:
        self.names = [s.name for s in select_targets(model)]
        self.weights = {n: model.get_submodule(n).weight.detach().clone() for n in self.names}
        gradients = output_gradients(model, self.names, first_batches(batches, GRADIENT_TOKENS))
        self.scale = {n: gradients[n].mean().sqrt().float() for n in self.names}
        self.moments = dense_moments(model, self.names, batches)
        self._spectra: dict[str, Tensor] = {}

    def stacked(self, unit: list[str]) -> Tensor:
        return torch.cat([self.scale[n] * self.weights[n] for n in unit])

    def spectrum(self, unit: list[str]) -> Tensor:
        key = "+".join(unit)
        if key not in self._spectra:
            found = self.moments[unit[0]]
            assert found.inputs is not None
            mean = found.inputs / found.tokens
            self._spectra[key] = weighted_singular_values(self.stacked(unit), mean, key).square()
        return self._spectra[key]

    def ranks(self, units: list[list[str]], ratio: float) -> list[int | None]:
        shapes = [(len(self.stacked(u)), self.weights[u[0]].shape[1]) for u in units]
        budget = int(ratio * sum(w.numel() for w in self.weights.values()))
        return allocate_ranks(shapes, [self.spectrum(u).numpy() for u in units], budget, ratio)

    @torch.no_grad()
    def put(self, model: Any, units: list[list[str]], ranks: list[int | None]) -> None:
        """Products of factors in the place of the weights."""
        for unit, rank in zip(units, ranks, strict=True):
            product = self.stacked(unit)
            if rank is not None:
                u, v = Regression(self.moments[unit[0]].inputs, None, 0.01, unit[0])(product, rank)
                product = u @ v
            parts = product.split([len(self.weights[n]) for n in unit])
            for name, part in zip(unit, parts, strict=True):
                model.get_submodule(name).weight.copy_(part / self.scale[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = common.SHARED / "data"
    parser.add_argument(
        "--model", required=True, help="folder of SmolLM2-135M-Instruct, or another model of Llama's names"
    )
    parser.add_argument("--calibration", default=str(data / "calibration.txt"))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--eval-blocks", type=int, default=12, help="evenly spaced blocks of 512 tokens of each text")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "shared_inputs.json")
    options = parser.parse_args()
    tokenizer, model = common.tokenizer_of(options.model), common.load(options.model, "cpu")
    texts = {}
    for name in ("wikitext2-test.txt", "heldout.txt"):
        found = common.blocks_of(common.read_text(str(data / name)), tokenizer, 512)
        texts[name] = found[torch.linspace(0, len(found) - 1, options.eval_blocks).long()]
    batches = read_batches(model, read_rows(options.calibration), options.calibration, tokenizer, options.tokens, 512)
    measured = Measured(model, batches)
    dense = {n: common.perplexity(model, b) for n, b in texts.items()}
    report: dict[str, Any] = {
        "machine": common.machine("cpu"), "model": Path(options.model).name, "tokens": options.tokens,
        "calibration": Path(options.calibration).name, "dense": dense, "rows": [],
    }  # fmt: skip
    for ratio in options.ratios:
        for name, shared in VARIANTS.items():
            units = units_of(measured.names, shared)
            ranks = measured.ranks(units, ratio)
            lost = sum(
                measured.spectrum(u)[r:].sum().item() for u, r in zip(units, ranks, strict=True) if r is not None
            )
            shapes = [(len(measured.stacked(u)), measured.weights[u[0]].shape[1]) for u in units]
            stored = sum(
                factored_parameters(s, r) if r is not None else s[0] * s[1] for s, r in zip(shapes, ranks, strict=True)
            )
            measured.put(model, units, ranks)
            found = {n: common.perplexity(model, b) for n, b in texts.items()}
            both = sum(common.excess(p, dense[n]) for n, p in found.items()) / len(found)
            row = {"param_ratio": ratio, "variant": name, "parameters": stored, "predicted": lost / 2, "perplexity": found,
                   "excess": both, "dense_units": sum(r is None for r in ranks)}  # fmt: skip
            report["rows"].append(row)
            common.write_json(options.output, report)
            print(row, file=sys.stderr, flush=True)
    rows = [
        (f"{r['param_ratio']:g}", r["variant"], f"{r['parameters'] / 1e6:.1f} M", f"{r['predicted']:.3f}",
         *(f"{p:.1f}" for p in r["perplexity"].values()), f"{r['excess']:.3f}")
        for r in report["rows"]
    ]  # fmt: skip
    print_table(("ratio", "V", "parameters", "predicted", *texts, "excess"), rows, title=report["model"])


if __name__ == "__main__":
    main()
