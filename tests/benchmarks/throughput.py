"""How fast are the wide and structured models of the papers beside the dense one of equal training FLOPs?

    PYTHONPATH=. python tests/benchmarks/throughput.py
    PYTHONPATH=. python tests/benchmarks/throughput.py --device cuda --dtype bfloat16 --batch-sizes 1 16 64 256

The presets of Wei et al. (2024, arXiv 2406.16450) with random weights, for speed does not depend on their values: the
dense model, the same with low rank, with grouped key-value heads, and the wide ones with a dense and a low-rank FFN.
Measured in tokens per second, the median of the repeats: reading a prompt, a training step without the optimizer, and
generation with a key-value cache. The models take turns, so that a disturbance meets all.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lowrank_ft import preset_config
from lowrank_ft.console import print_table
from lowrank_ft.factorization.plan import count_parameters
from lowrank_ft.factorization.solvers import Factors
from lowrank_ft.factorization.targets import block_index, ffn_linears
from lowrank_ft.nn.replace import factorized
from lowrank_ft.pretraining.presets import Preset, preset
from tests.benchmarks import common


def models(size: str) -> dict[str, Preset]:
    wide = preset(f"wei2024-{size}-wide")
    dense = preset(f"wei2024-{size}")
    return {
        "dense": dense,
        "grouped heads": preset(f"wei2024-{size}", num_key_value_heads=dense.num_attention_heads // 4),
        "low rank, 63 %": preset(f"wei2024-{size}-r63"),
        "low rank, 32 %": preset(f"wei2024-{size}-r32"),
        "wide, dense FFN": wide.dense,
        "wide and structured": wide,
    }


def build(made: Preset, options: argparse.Namespace) -> Any:
    model = AutoModelForCausalLM.from_config(preset_config(made), dtype=getattr(torch, options.dtype))
    if made.rank is not None:
        for spec in ffn_linears(model):
            if block_index(model, spec.name) != 0:
                rows, columns = spec.shape
                factors = Factors(torch.randn(rows, made.rank) * 0.02, torch.randn(made.rank, columns) * 0.02)
                model.set_submodule(spec.name, factorized(model.get_submodule(spec.name), factors))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model.to(options.device)


def prompt(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        model.eval()(input_ids=ids)


def training_step(model: Any, ids: torch.Tensor) -> None:
    model.train()(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def generation(new: int) -> Callable[[Any, torch.Tensor], None]:
    def run(model: Any, ids: torch.Tensor) -> None:
        mask = torch.ones_like(ids)
        model.eval().generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    return run


def seconds(function: Callable[[Any, torch.Tensor], None], model: Any, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    function(model, ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="m", choices=("m", "l"), help="those for which there is a wide preset")
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt or training sequence")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="for generation")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "throughput.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    tasks: dict[str, tuple[Callable[[Any, torch.Tensor], None], tuple[int, int], int]] = {
        "prompt": (prompt, (1, options.length), options.length),
        "training step": (training_step, (1, options.length), options.length),
    }
    for batch in options.batch_sizes:
        tasks[f"generation, batch {batch}"] = (generation(options.new_tokens), (batch, 1), batch * options.new_tokens)
    built = {name: (made, build(made, options)) for name, made in models(options.size).items()}
    times: dict[tuple[str, str], list[float]] = {}
    for repeat in range(options.repeats + 1):  # the first warms up
        for task, (function, shape, _) in tasks.items():
            ids = torch.randint(0, 32_000, shape, device=options.device)
            for name, (_, model) in built.items():
                taken = seconds(function, model, ids)
                if repeat:
                    times.setdefault((name, task), []).append(taken)
    rows = [
        {
            "model": name, "parameters": count_parameters(model), "training_flops": made.accounting().training_flops,
            **{task: tokens / statistics.median(times[name, task]) for task, (_, _, tokens) in tasks.items()},
        }
        for name, (made, model) in built.items()
    ]  # fmt: skip
    report = {"machine": common.machine(options.device), "size": options.size, "dtype": options.dtype, "rows": rows}
    common.write_json(options.output, report | {"length": options.length, "new_tokens": options.new_tokens})
    shown = [
        (r["model"], f"{r['parameters'] / 1e6:.0f} M", f"{r['training_flops']:.3g}", *(f"{r[t]:,.1f}" for t in tasks))
        for r in rows
    ]
    print_table(("model", "parameters", "training FLOPs", *tasks), shown, title="tokens per second")


if __name__ == "__main__":
    main()
