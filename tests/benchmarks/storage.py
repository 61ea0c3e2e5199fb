"""What the pivoted form costs and saves in a checkpoint: bytes, rounding, and equality with plain factors.

    PYTHONPATH=. python tests/benchmarks/storage.py --model path/to/SmolLM2-135M-Instruct

Each size is converted by plain SVD, as calibration does not matter here. The same factors are then stored in four ways,
plain and pivoted, in float32 and bfloat16. Loss and KL are against the model with its factors in float32, on held-out
text; greedy tokens continue the first prompt of that text.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from lowrank_ft.console import print_table
from lowrank_ft.conversion.convert import convert
from lowrank_ft.nn.forms import FORMS, layer_factors, stored_as
from lowrank_ft.nn.lowrank_linear import lowrank_layers
from tests.benchmarks import common

RATIOS = (0.9, 0.8, 0.6)
PROMPT, NEW = 32, 32


@torch.no_grad()
def logits_of(model: Any, blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(b[None], use_cache=False).logits.float() for b in blocks])


@torch.no_grad()
def measure(model: Any, form: str, dtype: torch.dtype, blocks: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """One way of storing the factors of ``model``, computed in float32."""
    products = {name: _product(layer) for name, layer in lowrank_layers(model)}
    stored = copy.deepcopy(model)
    with stored_as(stored, form, dtype):
        errors, largest, size = [], 0.0, 0
        for name, layer in lowrank_layers(stored):
            for part in (layer.U, layer.V):
                part.float()
                size += part.weight.numel() * dtype.itemsize
            size += layer.order.numel() * 4 if layer.pivot else 0
            errors.append(((_product(layer) - products[name]).norm() / products[name].norm()).item())
            if layer.pivot:
                largest = max(largest, (layer.U if layer.pivot == "output" else layer.V).weight.abs().max().item())
        found = logits_of(stored, blocks)
        tokens = stored.generate(blocks[:1, :PROMPT], max_new_tokens=NEW, do_sample=False)[0, PROMPT:].tolist()
    labels = blocks[:, 1:].flatten()
    losses = [F.cross_entropy(x[:, :-1].flatten(0, 1), labels).item() for x in (found, wanted)]
    kl = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    return {
        "form": form, "dtype": str(dtype).removeprefix("torch."), "bytes": size, "weight_error": sum(errors) / len(errors),
        "largest_coefficient": round(largest, 3), "logits_error": ((found - wanted).norm() / wanted.norm()).item(),
        "kl": kl.item(), "loss_change": losses[0] - losses[1], "loss": losses[1], "greedy": tokens,
    }  # fmt: skip


def _product(layer: Any) -> torch.Tensor:
    left, right = layer_factors(layer)
    return left.double() @ right.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(parser)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--text", default=str(common.SHARED / "data" / "heldout.txt"))
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "storage.json")
    options = parser.parse_args()
    tokenizer = common.tokenizer_of(options.model)
    blocks = common.blocks_of(common.read_text(options.text)[:200_000], tokenizer, options.block_size)[: options.blocks]
    rows = []
    for ratio in options.ratios:
        model = common.load(options.model, options.device)
        convert(model, param_ratio=ratio)
        wanted = logits_of(model, blocks)
        for dtype in (torch.float32, torch.bfloat16):
            for form in FORMS:
                rows.append({"param_ratio": ratio, **measure(model, form, dtype, blocks, wanted)})
    report = {
        "machine": common.machine(options.device), "model": Path(options.model).name, "text": Path(options.text).name,
        "tokens": blocks.numel(), "rows": rows,
    }  # fmt: skip
    common.write_json(options.output, report)
    print_table(
        ("ratio", "form", "dtype", "MB", "weight error", "largest C", "logits error", "KL", "loss change", "greedy"),
        [
            (
                str(r["param_ratio"]), r["form"], r["dtype"], f"{r['bytes'] / 1e6:.2f}", f"{r['weight_error']:.2e}",
                str(r["largest_coefficient"]), f"{r['logits_error']:.2e}", f"{r['kl']:.2e}", f"{r['loss_change']:+.2e}",
                json.dumps(r["greedy"] == next(o["greedy"] for o in rows if o["param_ratio"] == r["param_ratio"])),
            )
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
