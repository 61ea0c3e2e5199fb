"""Is the compact model faster: a feed-forward network alone, and whole models, beside what arithmetic and memory allow.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/speed.py --model SMOLLM2 --compact FOLDER...
    PYTHONPATH=. python tests/benchmarks/speed.py --parts ffn --device cuda --dtype bfloat16 --tokens 1 16 2048 30000

Part ``ffn`` is the protocol of Wei et al. (2024, arXiv 2406.16450): two linears of width d and 4 d, dense and with 63 %
and 32 % of the parameters, forward and forward with backward. Parts ``prefill`` and ``decode`` run models: the one that
is named, its compact versions, the last of them merged, LoRA on it, and Llamas of random weights in the shapes of
Llama-3.2-1B. Every row says how many times as fast as dense it is, and what floating-point operations (``flop``) and
bytes of weights (``byte``) allow.
On a CPU the times are CPU seconds of one thread, each the shortest of its repeats, so that other work counts little.
Rows that the output holds are not measured again.

glibc returns large buffers to the system, and the next one is fetched page by page. This is measured without that, as under
jemalloc or tcmalloc, by

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 PYTHONPATH=. OMP_NUM_THREADS=1 python \
        tests/benchmarks/speed.py --parts ffn --tokens 2048 --forward-only --output tests/benchmarks/results/speed_kept_pages.json
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from lowrank_ft.console import print_table
from lowrank_ft.factorization.pivoting import pivot_side
from lowrank_ft.factorization.plan import make_plan
from lowrank_ft.factorization.ranks import rank_at
from lowrank_ft.nn.lowrank_linear import LowRankLinear, lowrank_layers
from lowrank_ft.nn.replace import merge
from tests.benchmarks import common

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True}  # fmt: skip
PROMPT, NEW = 512, 16


class FeedForward(nn.Module):
    def __init__(self, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.up, self.down = up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def factored(rows: int, columns: int, ratio: float, form: str, **options: Any) -> LowRankLinear:
    """A layer with this share of the dense parameters; random."""
    rank = round(rank_at((rows, columns), ratio))
    if form == "plain":
        return LowRankLinear(columns, rows, round(ratio * rows * columns / (rows + columns)), bias=False, **options)
    layer = LowRankLinear(columns, rows, rank, bias=False, pivot=pivot_side((rows, columns), rank), **options)
    # As real ones are: r entries anywhere, each part in ascending order.
    places = torch.randperm(len(layer.order))
    places = torch.cat([places[:rank].sort().values, places[rank:].sort().values])
    layer.order.copy_(places.argsort() if layer.pivot == "output" else places)
    return layer


def feed_forwards(width: int, **options: Any) -> dict[str, tuple[float, FeedForward]]:
    """By name: the share of the parameters, and the network."""
    linear = {"bias": False, **options}
    made = {"dense": (1.0, FeedForward(nn.Linear(width, 4 * width, **linear), nn.Linear(4 * width, width, **linear)))}
    for ratio in (0.63, 0.32):
        for form in ("pivoted", "plain"):
            up = factored(4 * width, width, ratio, form, **options)
            down = factored(width, 4 * width, ratio, form, **options)
            made[f"{form} {ratio:.0%}"] = ((up.numbers + down.numbers) / (8 * width * width), FeedForward(up, down))
    return made


def shortest(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """The calls take turns; the first turn warms up."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], clock() - start)
    return best


def ffn_rows(width: int, tokens: int, training: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    networks = feed_forwards(width, **kind)
    x = torch.randn(tokens, width, **kind, requires_grad=training)

    def call(network: FeedForward) -> None:
        with torch.set_grad_enabled(training):
            y = network(x)
            if training:
                y.sum().backward()

    repeats = 3 if tokens * width * width > 2**32 else 20
    seconds = shortest({n: (lambda f=f: call(f)) for n, (_, f) in networks.items()}, repeats, options.device)
    part = "ffn training" if training else "ffn"
    return [
        row(part, f"width {width}, {tokens} tokens", name, seconds["dense"] / seconds[name], 1 / share, 1 / share, seconds[name])
        for name, (share, _) in networks.items() if name != "dense"
    ]  # fmt: skip


def row(part: str, case: str, name: str, ratio: float, flop: float, byte: float, seconds: float) -> dict[str, Any]:
    return {"part": part, "case": case, "name": name, "ratio": round(ratio, 3), "flop_bound": round(flop, 3),
            "byte_bound": round(byte, 3), "seconds": float(f"{seconds:.4g}")}  # fmt: skip


def random_llama(ratio: float | None) -> Any:
    """Shapes of Llama-3.2-1B; pivoted factors at one ratio for all linears."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_1B), dtype=torch.float32)
    if ratio is not None:
        for entry in make_plan(model, param_ratio=ratio).linears:
            with torch.device("meta"):
                layer = LowRankLinear(entry.shape[1], entry.shape[0], entry.rank or 1, bias=False,
                                      pivot=pivot_side(entry.shape, entry.rank or 1))  # fmt: skip
            model.set_submodule(entry.name, layer)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    for _, layer in lowrank_layers(model):
        layer.order.copy_(torch.randperm(len(layer.order)))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.tie_weights()
    return model.eval()


def read_at_a_step(model: Any) -> tuple[int, int]:
    """Multiply-adds for a token, and bytes of the weights that one step reads: all matrices but the input embedding."""
    head = model.get_output_embeddings().weight
    counted = {
        id(p): p for n, p in model.named_parameters() if p.dim() > 1 and p is not model.get_input_embeddings().weight
    }
    counted[id(head)] = head
    numbers = sum(p.numel() for p in counted.values())
    return numbers, numbers * head.element_size()


def prepared(model: Any, compiled: bool) -> Any:
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    if compiled:
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward, dynamic=False)
    return model


def prefill(model: Any, batch: int) -> None:
    with torch.inference_mode():
        model(input_ids=torch.arange(batch * PROMPT).view(batch, PROMPT) % 1000, logits_to_keep=1)


def decode(model: Any, batch: int) -> None:
    ids = torch.arange(batch * 32).view(batch, 32) % 1000
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def model_rows(part: str, case: str, models: dict[str, Any], batch: int, repeats: int) -> list[dict[str, Any]]:
    work = prefill if part == "prefill" else decode
    seconds = shortest({n: (lambda m=m: work(m, batch)) for n, m in models.items()}, repeats, "cpu")
    numbers = {n: read_at_a_step(m) for n, m in models.items()}
    return [
        row(part, case, n, seconds["dense"] / seconds[n], *(numbers["dense"][i] / numbers[n][i] for i in (0, 1)), seconds[n])
        for n in models if n != "dense"
    ]  # fmt: skip


def named_models(options: argparse.Namespace) -> dict[str, Any]:
    found = {"dense": common.load(options.model, "cpu")}
    found |= {Path(folder).name: common.load(folder, "cpu") for folder in options.compact}
    if options.compact:
        found["merged"] = merge(common.load(options.compact[-1], "cpu"))
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    found["LoRA r16, not merged"] = get_peft_model(common.load(options.model, "cpu"), lora).eval()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["ffn", "model", "1b"], choices=["ffn", "model", "1b"])
    parser.add_argument("--model", help="a dense model, for the part model")
    parser.add_argument("--compact", nargs="*", default=[], help="compact versions of it")
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 1536, 2048, 3072])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 2048])
    parser.add_argument("--forward-only", action="store_true", help="no backward passes in the part ffn")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=8, help="of a model; the shortest counts")
    parser.add_argument("--compiled", action="store_true", help="models also with torch.compile and a static cache")
    parser.add_argument("--device", default="cpu", help="of the part ffn")
    parser.add_argument("--dtype", default="float32", help="of the part ffn")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "speed.json")
    options = parser.parse_args()
    facts = {"machine": common.machine(options.device), "kept_pages": "MALLOC_MMAP_THRESHOLD_" in os.environ}
    report = common.read_json(options.output) or {**facts, "rows": []}
    have = {(r["part"], r["case"]) for r in report["rows"]}

    def keep(part: str, case: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        if (part, case) not in have:
            report["rows"] += measure()
            common.write_json(options.output, report)
            print(f"{part}, {case}: done", flush=True)

    if "ffn" in options.parts:
        for width in options.widths:
            for tokens in options.tokens:
                for training in (False,) if options.forward_only else (False, True):
                    keep("ffn training" if training else "ffn", f"width {width}, {tokens} tokens",
                         lambda w=width, n=tokens, t=training: ffn_rows(w, n, t, options))  # fmt: skip
    sets: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    if "model" in options.parts and options.model:
        sets.append((Path(options.model).name, lambda: named_models(options)))
    if "1b" in options.parts:
        sets.append(("random 1B", lambda: {"dense": random_llama(None), "pivoted 60%": random_llama(0.6)}))
    for name, load in sets:
        for compiled in (False, True) if options.compiled else (False,):
            mode = "compiled" if compiled else "eager"
            cases = {
                (p, b): f"{name}, {mode}, batch {b}"
                for p, b in [("prefill", 1), *(("decode", b) for b in options.batches)]
            }
            if all((part, case) in have for (part, _), case in cases.items()):
                continue
            models = {n: prepared(m, compiled) for n, m in load().items()}
            for (part, batch), case in cases.items():
                keep(part, case, partial(model_rows, part, case, models, batch, options.repeats))
            models.clear()
    show(report)
    draw(report, options.output.with_suffix(".png"))


def show(report: dict[str, Any]) -> None:
    table = []
    for r in report["rows"]:
        bound = r["byte_bound"] if r["part"] == "decode" or r["case"].endswith(", 1 tokens") else r["flop_bound"]
        table.append(
            (r["part"], r["case"], r["name"], f"{r['ratio']:.2f}", f"{bound:.2f}", f"{r['ratio'] / bound:.0%}")
        )
    print_table(("part", "case", "model", "times as fast as dense", "bound", "reached"), table)


def draw(report: dict[str, Any], path: Path) -> None:
    """The feed-forward network: speed by width, a plot for each number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r | dict(zip(("width", "tokens"), map(int, r["case"].replace("width ", "").replace(" tokens", "").split(", ")),
                         strict=True)) for r in report["rows"] if r["part"] == "ffn"]  # fmt: skip
    if not rows:
        return
    tokens = sorted({r["tokens"] for r in rows})
    size = (4.2 * len(tokens), 3.8)
    figure, axes = plt.subplots(1, len(tokens), figsize=size, sharey=True, layout="constrained", squeeze=False)
    for axis, count in zip(axes[0], tokens, strict=True):
        for color, ratio in (("C0", "63%"), ("C1", "32%")):
            for form, style in (("pivoted", "-"), ("plain", "--")):
                line = sorted(
                    (r["width"], r["ratio"]) for r in rows if r["tokens"] == count and r["name"] == f"{form} {ratio}"
                )
                axis.plot(*zip(*line, strict=True), style, color=color, marker="o", ms=4, label=f"{form}, {ratio}")
            bound = next(r["flop_bound"] for r in rows if r["name"] == f"pivoted {ratio}")
            axis.axhline(bound, color=color, lw=0.8, ls=":", label=f"bound, {ratio}")
        axis.axhline(1, color="0.6", lw=0.8)
        axis.set(xlabel="width", title=f"{count:,} token{'s' * (count != 1)}")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("times as fast as dense")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
