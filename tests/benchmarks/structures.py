"""Which structure holds a pretrained weight best at equal parameters: low rank, or block-diagonal factors?

    PYTHONPATH=. python tests/benchmarks/structures.py --output tests/benchmarks/results/structures.json

Wei et al. 2024 (arXiv 2407.09835) train feed-forward layers from scratch in three structures. All three have a best
approximation of a given ``W (out, in)`` in closed form, by truncated SVDs of its blocks:

    LowRank        U V                                                    one block:  W itself at rank r
    BlockDense     U diag(V_1 .. V_b)                                     b blocks:   W cut along its inputs
    BlockShuffle   diag(U_1 .. U_b), a shuffle, diag(V_1 .. V_b)          b^2 blocks: W cut both ways (Monarch)

because every block of the product has factors of its own. Prints the relative error ``|W - approximation| / |W|``
(Frobenius), over all linears of the model's blocks.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.console import print_table
from lowrank_ft.factorization.targets import select_targets
from lowrank_ft.nn.replace import dense_weight
from tests.benchmarks import common

RATIOS = (0.8, 0.6, 0.4, 0.25)


def blocks_of(weight: Tensor, rows: int, columns: int) -> Tensor:
    """``W`` cut into ``(rows, columns, out / rows, in / columns)``."""
    height, width = weight.shape
    return weight.reshape(rows, height // rows, columns, width // columns).transpose(1, 2)


def tail(weight: Tensor, rows: int, columns: int, ratio: float) -> tuple[float, int]:
    """Squared error of the best approximation within the budget, and the parameters that it has."""
    height, width = weight.shape
    # Every block of the product has factors of its own, (out / rows, rank) and (rank, in / columns).
    per_rank = rows * columns * (height // rows + width // columns)
    rank = int(ratio * weight.numel() / per_rank)
    values = torch.linalg.svdvals(blocks_of(weight, rows, columns))
    return values[..., rank:].square().sum().item(), rank * per_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(parser)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "structures.json")
    options = parser.parse_args()
    model = common.load(options.model, options.device)
    weights = [dense_weight(model.get_submodule(s.name)).double() for s in select_targets(model)]
    total, size = sum(w.square().sum().item() for w in weights), sum(w.numel() for w in weights)
    structures = {"LowRank": (1, 1), "BlockDense, 2": (1, 2), "BlockDense, 4": (1, 4), "BlockShuffle, 2": (2, 2),
                  "BlockShuffle, 4": (4, 4)}  # fmt: skip
    rows: list[dict[str, Any]] = []
    for ratio in RATIOS:
        for name, cut in structures.items():
            found = [tail(w, *cut, ratio) for w in weights]
            error, parameters = (sum(f[0] for f in found) / total) ** 0.5, sum(f[1] for f in found)
            rows.append({"ratio": ratio, "structure": name, "parameters": parameters / size, "error": error})
    common.write_json(options.output, {
        "machine": common.machine(options.device), "model": Path(options.model).name, "linears": len(weights), "rows": rows,
    })  # fmt: skip
    shown = [(f"{r['ratio']:g}", r["structure"], f"{r['parameters']:.3f}", f"{r['error']:.4f}") for r in rows]
    print_table(
        ("param ratio", "structure", "parameters kept", "relative error"), shown, title=Path(options.model).name
    )


if __name__ == "__main__":
    main()
