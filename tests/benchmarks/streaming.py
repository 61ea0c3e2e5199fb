"""Peak memory of a conversion block by block, and of the same in memory, on a model of random weights.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/streaming.py --work DIR

The shapes are those of TinyLlama-1.1B, in bfloat16. Each conversion is the command, in a process of its own, whose peak
resident memory is reported beside what was to be kept. A run that is broken off goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowrank_ft.console import print_table
from tests.benchmarks import common
from tests.benchmarks.measured import measured

SHAPES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
          "num_key_value_heads": 4, "vocab_size": 32_000}  # fmt: skip
PROCESS = 1_200_000_000
"""Allowed beside six times the largest linear in float32; a calibrated conversion has one block more, and its activations."""
_COPIES = 3
"""Of the hidden states of all tokens, beside what enters each block, on which outputs are weighed."""


def make_model(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    AutoTokenizer.from_pretrained(str(common.SHARED / "models" / "tiny-llama")).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and what is made of it")
    parser.add_argument("--rows", nargs="+", default=["svd, streamed", "svd, whole", "activation, streamed"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--param-ratio", type=float, default=0.6)
    size.add_argument("--rank", type=int)
    parser.add_argument("--tokens", default="4096", help="of calibration, where there is any")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "streaming.json")
    options = parser.parse_args()
    ranks = ["--param-ratio", str(options.param_ratio)] if options.rank is None else ["--rank", str(options.rank)]
    source = options.work / "dense"
    make_model(source)
    largest = 4 * SHAPES["hidden_size"] * SHAPES["intermediate_size"]
    block = 4 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 2048 * 5632)
    rows: list[dict[str, Any]] = []
    for name in options.rows:
        method, how = name.split(", ")
        folder = options.work / name.replace(", ", "-")
        flags = ["--method", method, *ranks, *(["--stream"] if how == "streamed" else [])]
        if method != "svd":
            text = str(common.SHARED / "data" / "calibration.txt")
            flags += ["--calibration-data", text, "--calibration-tokens", options.tokens]
            flags += [] if how == "streamed" else ["--distill-epochs", "0", "--own-share", "0"]
        command = [
            sys.executable,
            "-m",
            "lowrank_ft_cli.main",
            "convert",
            str(source),
            *flags,
            "--output-dir",
            str(folder),
        ]
        found = measured(command, folder.with_suffix(".json"))
        hidden = 4 * int(options.tokens) * SHAPES["hidden_size"]
        calibrated = block + (_COPIES + SHAPES["num_hidden_layers"]) * hidden
        allowed = PROCESS + 6 * largest + (0 if method == "svd" else calibrated)
        rows.append({"row": name, **found, "allowed_bytes": allowed if how == "streamed" else None})
        facts = {"machine": common.machine("cpu"), "shapes": SHAPES, "size": ranks, "tokens": options.tokens}
        report = {**facts, "rows": rows}
        common.write_json(options.output, report)
    print_table(
        ("conversion", "peak, GB", "allowed, GB", "CPU seconds"),
        [(r["row"], f"{r['peak_bytes'] / 1e9:.2f}", f"{r['allowed_bytes'] / 1e9:.2f}" if r["allowed_bytes"] else "",
          f"{r['cpu_seconds']:.0f}") for r in rows],
    )  # fmt: skip


if __name__ == "__main__":
    main()
