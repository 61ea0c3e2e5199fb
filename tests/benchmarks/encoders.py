"""How far a compact encoder's embeddings are from the dense encoder's, on sentences that it was not calibrated on.

    PYTHONPATH=. python tests/benchmarks/encoders.py --model ALL-MINILM-L6-V2

An embedding is the normalized mean of the last hidden states. For the same sentences in both models: their cosine, its mean
and its lowest value; and Spearman's correlation of the cosines of all pairs of sentences, for rankings and clusters are made
of those. The baseline is whitened SVD at uniform ranks, stored as U V (SVD-LLM's formula, in ``common.py``), on the text of
the ``default`` row. The other rows are commands with no further flag. Rows that the output file holds are not measured again.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from lowrank_ft.checkpoints.source import Source
from lowrank_ft.console import print_table
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.options import CalibrationOptions
from lowrank_ft.conversion.prepare import prepare
from lowrank_ft.export import save_compact
from tests.benchmarks import common

BASELINE = "whitened SVD (baseline)"
DEFAULT = "lowrank-ft convert"
_LENGTHS = range(40, 301)  # characters of a sentence


def sentences(path: Path, count: int) -> list[str]:
    """Drawn at random from the lines of a file that are no headings, each once."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = [s for line in lines if not line.startswith("=") for s in re.split(r"(?<=[.!?])\s+", line)]
    found = list(dict.fromkeys(s for s in found if len(s) in _LENGTHS))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i] for i in order[:count]]


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Normalized means of the last hidden states, ``(texts, hidden)``."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        batch = tokenizer([texts[i] for i in rows], padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
        found |= dict(zip(rows, F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


def compare(dense: Tensor, found: Tensor) -> dict[str, float]:
    """Cosines of the same texts, and how alike the cosines of all pairs are ranked."""
    cosines = (dense * found).sum(-1)
    first, second = torch.triu_indices(len(dense), len(dense), 1)
    ranks = [(e @ e.T)[first, second].argsort().argsort().double() for e in (dense, found)]
    return {
        "mean_cosine": round(cosines.mean().item(), 4),
        "worst_cosine": round(cosines.min().item(), 4),
        "spearman": round(torch.corrcoef(torch.stack(ranks))[0, 1].item(), 4),
    }


def methods(options: argparse.Namespace, ratio: float) -> dict[str, Callable[[Path], None]]:
    """Name to what writes that method's checkpoint into a folder."""

    def command(*flags: str) -> Callable[[Path], None]:
        line = ["convert", options.model, "--param-ratio", str(ratio), *flags, "--output-dir"]
        python = [sys.executable, "-m", "lowrank_ft_cli.main"]
        return lambda folder: (
            subprocess.run([*python, *line, str(folder)], check=True, stdout=subprocess.DEVNULL) and None
        )

    def whitened(folder: Path) -> None:
        model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
        settings = CalibrationOptions(calibration_data=options.calibration)
        batches = prepare(settings, Source(options.model), model).calibration(model).batches
        common.whitened_svd(model, common.uniform_plan(model, ratio), [dict(b) for b in batches])
        save_compact(model, folder, form="factors")

    def plain(folder: Path) -> None:
        model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
        convert(model, common.uniform_plan(model, ratio))
        save_compact(model, folder, form="factors")

    text = ("--calibration-data", options.calibration)
    return {
        "plain SVD": plain,
        BASELINE: whitened,
        f"{DEFAULT}, no text": command(),
        f"{DEFAULT} --effort fast": command("--effort", "fast", *text),
        DEFAULT: command(*text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = common.SHARED / "data"
    parser.add_argument("--model", required=True, help="folder or Hub id of an encoder that is used with mean pooling")
    parser.add_argument("--calibration", default=str(data / "calibration.txt"))
    parser.add_argument("--held-out", nargs="+", default=[str(data / "heldout.txt"), str(data / "wikitext2-test.txt")])
    parser.add_argument("--sentences", type=int, default=300, help="of each text")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.9, 0.8, 0.6])
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="methods to run, by their names (default: all)")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "encoders.json")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = {Path(n).name: sentences(Path(n), options.sentences) for n in options.held_out}
    dense = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    wanted = {name: embed(dense, tokenizer, found) for name, found in texts.items()}
    report: dict[str, Any] = {
        "machine": common.machine("cpu"),
        "calibration": Path(options.calibration).name,
        "sentences": {name: len(found) for name, found in texts.items()},
        "dense": {"bytes": (Path(options.model) / "model.safetensors").stat().st_size},
        "rows": [],
    }
    if options.output.is_file():  # go on where an earlier run stopped
        earlier = json.loads(options.output.read_text(encoding="utf-8"))
        if all(earlier.get(k) == report[k] for k in ("calibration", "sentences", "dense")):
            report["rows"] = earlier["rows"]
    have = {(r["param_ratio"], r["method"]) for r in report["rows"]}
    for ratio in options.ratios:
        for name, write in methods(options, ratio).items():
            if (options.only and name not in options.only) or (ratio, name) in have:
                continue
            with tempfile.TemporaryDirectory() as folder:
                start = time.monotonic()
                write(Path(folder) / "m")
                seconds = round(time.monotonic() - start, 1)
                model = AutoModel.from_pretrained(Path(folder) / "m", dtype=torch.float32).eval()
                size = (Path(folder) / "m" / "model.safetensors").stat().st_size
            found = {n: compare(wanted[n], embed(model, tokenizer, t)) for n, t in texts.items()}
            report["rows"].append(
                {"param_ratio": ratio, "method": name, "seconds": seconds, "bytes": size, "texts": found}
            )
            print(ratio, name, seconds, found, file=sys.stderr, flush=True)
            common.write_json(options.output, report)
    order = list(methods(options, 1.0))
    report["rows"].sort(key=lambda r: (-r["param_ratio"], order.index(r["method"])))
    common.write_json(options.output, report)
    show(report)


def show(report: dict[str, Any]) -> None:
    texts = list(report["sentences"])
    shown = ("mean_cosine", "worst_cosine", "spearman")
    rows = [
        (r["method"], str(r["param_ratio"]), f"{r['bytes'] / 1e6:.1f}", f"{r['seconds']:.0f}",
         *(f"{r['texts'][t][k]:.4f}" for t in texts for k in shown))
        for r in report["rows"]
    ]  # fmt: skip
    columns = ("method", "ratio", "MB", "seconds", *(f"{t}: {k.replace('_', ' ')}" for t in texts for k in shown))
    print_table(columns, rows, title=f"Embeddings beside the dense encoder's ({report['dense']['bytes'] / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
