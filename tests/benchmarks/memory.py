"""Is the estimate of ``lowrank-ft plan --memory`` right? Against the measured peak of a training step, by mode.

    PYTHONPATH=. python tests/benchmarks/memory.py --output tests/benchmarks/results/memory.json

The Trainer takes three steps, all of them guided, on random weights and tokens; the second one, which has the
optimizer's state already, is measured. On a CPU, torch's profiler reports every allocation and release, so the
highest sum of them on top of weights, guides and optimizer state is the exact peak of tensors, those inside of an operation
included. On a GPU it is ``torch.cuda.max_memory_allocated``. A run that is broken off, or repeated on the same machine,
measures what is missing.
"""

import argparse
import gc
import json
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lowrank_ft.console import human_bytes, print_table
from lowrank_ft.conversion.convert import convert
from lowrank_ft.costs.memory import MODES, Architecture, Mode, Settings, estimate
from lowrank_ft.data.examples import pack
from lowrank_ft.factorization.plan import Plan, make_plan
from lowrank_ft.training import TrainArguments, Trainer
from lowrank_ft.training.resume import optimizer_tensors
from tests.benchmarks import common

TARGET = 0.15
LLAMA = {
    "model_type": "llama", "vocab_size": 4000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 4000, "n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512}
MODELS: dict[str, dict[str, Any]] = {
    "llama 256 x 4": LLAMA,
    "llama 512 x 6": {**LLAMA, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6},
    "gpt2 256 x 4": GPT2,
    "gpt2 512 x 6": {**GPT2, "n_embd": 512, "n_layer": 6},
}
SMALL, LARGE = "llama 256 x 4", "llama 512 x 6"
VARIANTS: list[tuple[str, Mode, dict[str, Any]]] = [
    *((model, mode, {}) for model in MODELS for mode in MODES if mode.method != "qlora" or "llama" in model),
    *((LARGE, mode, {"gradient_checkpointing": True}) for mode in MODES),
    *((LARGE, mode, {"mixed_precision": "bf16"}) for mode in MODES if mode.method != "qlora"),
    *((LARGE, mode, {"dtype": "bfloat16"}) for mode in MODES if mode.method != "qlora"),
    *((LARGE, mode, {"optim": "adamw_8bit"}) for mode in MODES if mode.method == "full" or mode.guide_bits),
    *((LARGE, mode, {"batch_size": 1}) for mode in MODES if mode.method != "qlora"),
    *((LARGE, Mode(f"residual, train {t}", "factors", "residual", None, t), {}) for t in ("factors", "lora", "leading")),
    (LARGE, Mode("no guide", "factors"), {"gradient_accumulation_steps": 2}),
]  # fmt: skip


def random_model(config: dict[str, Any], dtype: str) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=getattr(torch, dtype))


def prepare(model: nn.Module, plan: Plan, mode: Mode, settings: Settings) -> None:
    """Give the model the shape that the mode trains."""
    if mode.method == "factors":
        convert(model, plan, guide=None if mode.guide == "none" else mode.guide, guide_bits=mode.guide_bits)
    elif mode.method != "full":
        from peft import LoraConfig, inject_adapter_in_model

        if mode.method == "qlora":
            _quantize(model, plan)
        inject_adapter_in_model(LoraConfig(r=settings.lora_r, target_modules=[p.name for p in plan.linears]), model)


def _quantize(model: nn.Module, plan: Plan) -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    for p in plan.linears:
        dense: Any = model.get_submodule(p.name)
        packed = Linear4bit(
            p.shape[1], p.shape[0], bias=False, quant_type="nf4", compute_dtype=dense.weight.dtype, device="meta"
        )
        device = dense.weight.device
        packed.weight = Params4bit(
            dense.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=False, module=packed
        ).to(device)  # fmt: skip
        model.set_submodule(p.name, packed)


def measure(model: Any, mode: Mode, settings: Settings, device: str) -> int:
    """Bytes at the peak of the second step."""
    tokens = settings.batch_size * settings.block_size * settings.gradient_accumulation_steps
    data = pack(torch.randint(3, 4000, (3 * tokens,)).int().numpy(), settings.block_size)
    meter = _Profiled() if device == "cpu" else _OnGpu()

    def look(step: int, trainer: Trainer) -> None:
        if step == 1:
            meter.start(trainer)
        elif step == 2:
            meter.stop()

    AcceleratorState._reset_state(reset_partial_state=True)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainArguments(
            output_dir=folder, max_steps=3, guided_ratio=1.0, per_device_train_batch_size=settings.batch_size,
            mixed_precision=settings.mixed_precision, gradient_checkpointing=settings.gradient_checkpointing,
            gradient_accumulation_steps=settings.gradient_accumulation_steps, optim=settings.optim,
            trainable=mode.trainable, lora_r=settings.lora_r,
        )  # fmt: skip
        Trainer(model, args, data, on_step_end=look).train()
    return meter.peak


class _Profiled:
    """Allocations of a CPU, from torch's profiler."""

    peak = 0

    def start(self, trainer: Trainer) -> None:
        gc.collect()
        bare, optimizer = trainer._bare, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        tensors = [*bare.parameters(), *bare.buffers(), *optimizer_tensors(bare, optimizer).values()]
        tensors += [s.absmax for p in bare.parameters() if (s := getattr(p, "quant_state", None)) is not None]
        self.base = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def stop(self) -> None:
        self.profiler.stop()
        results: Any = self.profiler.profiler
        events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
        now = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            self.peak = max(self.peak, self.base + now)


class _OnGpu:
    """What torch's allocator handed out, at most."""

    peak = 0

    def start(self, trainer: Trainer) -> None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> None:
        self.peak = torch.cuda.max_memory_allocated()


def row(
    variant: tuple[str, Mode, dict[str, Any]], options: argparse.Namespace, known: dict[str, int]
) -> dict[str, Any]:
    """The estimate, always made anew, and the measurement, unless it is known from an earlier run."""
    name, mode, changes = variant
    kind = torch.device(options.device).type
    base = {"batch_size": options.batch_size, "block_size": options.block_size, "device": kind}
    settings = Settings(**{**base, **changes})
    model = random_model(MODELS[name], settings.dtype)
    plan = make_plan(model, param_ratio=options.param_ratio)
    guess = estimate(plan, Architecture.of(model), mode, settings).peak
    peak = known.get(key(name, mode.name, changes))
    if peak is None:
        prepare(model, plan, mode, settings)
        peak = measure(model.to(options.device), mode, settings, options.device)
    error = guess / peak - 1
    verdict = "met" if abs(error) <= TARGET else "MISSED"
    return {"model": name, "mode": mode.name, "settings": changes, "estimated": guess, "measured": peak,
            "error": round(error, 4), "verdict": verdict}  # fmt: skip


def key(name: str, mode: str, changes: dict[str, Any]) -> str:
    return json.dumps([name, mode, changes])


def show(report: dict[str, Any]) -> None:
    rows = [
        (
            r["model"], r["mode"], ", ".join(f"{k} {v}" for k, v in r["settings"].items()), human_bytes(r["estimated"]),
            human_bytes(r["measured"]), f"{r['error']:+.1%}", r["verdict"],
        )
        for r in report["rows"]
    ]  # fmt: skip
    columns = ("model", "mode", "changed", "estimated", "measured", "error", f"within {TARGET:.0%}")
    print_table(
        columns, rows, title=f"Peak memory of a training step, {report['tokens']} tokens, {report['machine']['device']}"
    )


def chosen(options: argparse.Namespace) -> Callable[[tuple[str, Mode, dict[str, Any]]], bool]:
    words = options.only.split(",") if options.only else []
    return lambda v: all(w in f"{v[0]} {v[1].name} {v[1].method} {v[2]}" for w in words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--param-ratio", type=float, default=0.5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", help="words, joined by commas, that must all be in a row's model, mode or settings")
    parser.add_argument("--output", type=common.Path, default=common.RESULTS / "memory.json")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*Memory block of unknown size.*")
    report: dict[str, Any] = {
        "machine": common.machine(options.device), "tokens": f"{options.batch_size} x {options.block_size}",
        "param_ratio": options.param_ratio, "rows": [],
    }  # fmt: skip
    known = {}
    if options.output.is_file():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if all(before[k] == report[k] for k in ("machine", "tokens", "param_ratio")):
            known = {key(r["model"], r["mode"], r["settings"]): r["measured"] for r in before["rows"]}
    for variant in filter(chosen(options), VARIANTS):
        report["rows"].append(row(variant, options, known))
        if not options.only:
            common.write_json(options.output, report)
    show(report)
    worst = max(report["rows"], key=lambda r: abs(r["error"]))
    print(f"largest error {worst['error']:+.1%} ({worst['model']}, {worst['mode']})")


if __name__ == "__main__":
    main()
