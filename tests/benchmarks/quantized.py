"""Compact and quantized: sizes, perplexity and speed of a dense model and of compact ones, in float, 8 and 4 bits.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/quantized.py --model SMOLLM2 --work DIR 0.9=DIR/ours-0.9 ...

Each compact checkpoint is named with its param ratio. Weights are loaded in bfloat16, with a second method over the
factors where the row has one, and written by ``save_pretrained``: that is the size. Loaded to compute in ``--dtype``, the
model is measured: perplexity on the first blocks of the text, and tokens per second of CPU time (on a GPU, of time) when
reading them and when writing, one sequence at a time, with a key-value cache. Every row is saved as it comes, and a run
that is broken off goes on. A folder that is not there yet is named in the result.
"""

import argparse
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowrank_ft  # noqa: F401 (registers the loader)
from lowrank_ft.console import print_table
from lowrank_ft.evaluation.perplexity import evaluate_blocks
from tests.benchmarks import common


def second_method(library: str, bits: int) -> Any:
    if library == "bitsandbytes" and bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if library == "bitsandbytes":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    assert bits == 8, "torchao's 4-bit kernels need a GPU"
    return TorchAoConfig(Int8WeightOnlyConfig())


def load(source: str, bits: int, options: argparse.Namespace, dtype: torch.dtype) -> Any:
    extra = {} if bits == 16 else {"quantization_config": second_method(options.library, bits)}
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=options.device, **extra).eval()


def stored_bytes(model: Any, folder: Path) -> int:
    """Bytes of the weights in the checkpoint of ``model``, which is written into ``folder`` for it."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))


def clock(device: str) -> Callable[[], float]:
    if not device.startswith("cuda"):
        return time.process_time  # other work on the machine does not count

    def now() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return now


@torch.inference_mode()
def measured(model: Any, blocks: torch.Tensor, new_tokens: int, now: Callable[[], float]) -> dict[str, float]:
    """Perplexity, and tokens per second of reading and of writing, the median of three replies."""
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    model(input_ids=blocks[:1, :32].to(model.device))  # some libraries repack at the first pass
    start = now()
    found = evaluate_blocks(model, blocks, 1)
    reading = blocks.numel() / (now() - start)
    prompt = blocks[:1, :16].to(model.device)
    writing = []
    for _ in range(3):
        start = now()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False,
        )  # fmt: skip
        writing.append(new_tokens / (now() - start))
    return {"perplexity": found.perplexity, "reading": reading, "writing": statistics.median(writing)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compact", nargs="*", help="RATIO=FOLDER of compact checkpoints of the model")
    parser.add_argument("--model", required=True, help="the dense model")
    parser.add_argument("--text", default=str(common.SHARED / "data" / "wikitext2-test.txt"))
    parser.add_argument("--blocks", type=int, default=12, help="of --block-size tokens")
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--library", choices=("bitsandbytes", "torchao"), default="bitsandbytes")
    parser.add_argument("--bits", type=int, nargs="+", choices=(16, 8, 4), default=[16, 8, 4])
    parser.add_argument("--dtype", default="float32", help="in which the models compute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, required=True, help="where checkpoints are written, one at a time")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "quantized.json")
    options = parser.parse_args()
    sources = {"dense": options.model, **dict(pair.split("=", 1) for pair in options.compact)}
    report = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {"rows": []}
    report["missing"] = [n for n, folder in sources.items() if n != "dense" and not Path(folder).is_dir()]
    settings = {"blocks": options.blocks, "block_size": options.block_size, "new_tokens": options.new_tokens}
    report |= {"machine": common.machine(options.device), "dtype": options.dtype, **settings}
    blocks = common.blocks_of(common.read_text(options.text), common.tokenizer_of(options.model), options.block_size)
    blocks = blocks[: options.blocks]
    for name, source in sources.items():
        for bits in options.bits if name not in report["missing"] else ():
            row = {"model": name, "bits": bits, "library": None if bits == 16 else options.library}
            if any(row.items() <= done.items() for done in report["rows"]):
                continue
            row["bytes"] = stored_bytes(load(source, bits, options, torch.bfloat16), options.work / "checkpoint")
            model = load(source, bits, options, getattr(torch, options.dtype))
            row |= measured(model, blocks, options.new_tokens, clock(options.device))
            report["rows"].append(row)
            common.write_json(options.output, report)
            print(row, flush=True)
    common.write_json(options.output, report)
    for name in report["missing"]:
        warnings.warn(f"{sources[name]} is not there; its rows are missing", stacklevel=1)
    order = {(name, bits): i for i, (name, bits) in enumerate((n, b) for n in sources for b in (16, 8, 4))}
    rows = sorted(report["rows"], key=lambda r: order.get((r["model"], r["bits"]), len(order)))
    print_table(
        ("model", "bits", "library", "MB", "perplexity", "reading, tokens/s", "writing, tokens/s"),
        [
            (r["model"], str(r["bits"]), r["library"] or "", f"{r['bytes'] / 1e6:.0f}", f"{r['perplexity']:.2f}",
             f"{r['reading']:.0f}", f"{r['writing']:.1f}")
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
