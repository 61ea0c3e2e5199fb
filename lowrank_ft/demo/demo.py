"""``lowrank-ft demo``: convert, fine-tune with a guide, export, reload in a fresh process; LoRA beside it.

Two trainings of the same length on the same data: the low-rank model with its dense weight phased out, and LoRA on the
dense model. Each has the learning rate that is best for it on this model and text (``tests/benchmarks/demo_rates.py``).
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lowrank_ft.checkpoints.atomic import check_output_dir, whole_folder
from lowrank_ft.checkpoints.companions import copy_companions
from lowrank_ft.console import human_bytes, human_count, print_table
from lowrank_ft.conversion.batches import training_calibration
from lowrank_ft.conversion.convert import convert
from lowrank_ft.conversion.guides import attach_guides
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.examples import TokenizedData, pack
from lowrank_ft.demo.reload import PROMPT
from lowrank_ft.demo.text import prose
from lowrank_ft.errors import CheckpointError
from lowrank_ft.evaluation.perplexity import evaluate_blocks, to_blocks
from lowrank_ft.export import save_compact
from lowrank_ft.factorization.plan import count_parameters
from lowrank_ft.training.options import TrainArguments
from lowrank_ft.training.trainer import Trainer

MODEL = Path(__file__).parent / "model"
BLOCK_SIZE = 256
LORA_RANK = 16
CALIBRATION_TOKENS = 32_768
LEARNING_RATES = {"low-rank": 2e-3, "LoRA": 5e-3}


@dataclass
class Row:
    """One line of the final table; ``model`` is let go once its speed is measured."""

    name: str
    parameters: int
    bytes: int
    perplexity: float
    model: Any
    tokens_per_second: float = 0.0


def run_demo(output_dir: Path, param_ratio: float = 0.6, max_steps: int = 120) -> list[Row]:
    """Run everything below ``output_dir``, print the table on stdout, and leave ``demo.json`` and ``training.png``.

    Raises:
        OutputError: the folder holds something else.
        CheckpointError: the reloaded model differs from the one that was exported.
    """
    start = time.monotonic()
    report = output_dir / "demo.json"
    if not report.is_file():  # the mark of an earlier demo, whose files may go
        check_output_dir(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        report.write_text("{}\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    train_text, held_out_text = prose()
    train_data = pack(token_ids(train_text, tokenizer), BLOCK_SIZE)
    held_out = to_blocks(torch.from_numpy(token_ids(held_out_text, tokenizer)).long(), BLOCK_SIZE)
    eval_data = pack(held_out[: len(held_out) // 2].flatten().int().numpy(), BLOCK_SIZE)
    _say(
        f"a small Llama trained on Python source code; {len(train_data.ids):,} tokens of Python's help topics to learn"
    )

    rows = [_row("dense, as it comes", _dense(), MODEL, held_out)]

    _say(f"1. convert to param ratio {param_ratio}, calibrated on the text to be learned: lowrank-ft convert")
    model = _dense()
    convert(
        model, param_ratio=param_ratio, calibration=training_calibration(train_data, CALIBRATION_TOKENS), progress=True
    )
    _save(model, output_dir / "converted")
    model = _reload_here(output_dir / "converted")  # pivoted, as it is stored and counted
    rows.append(_row("converted", model, output_dir / "converted", held_out))

    _say(f"2. fine-tune, {max_steps} steps, the dense weight phased out over the first quarter: lowrank-ft finetune")
    model = _reload_here(output_dir / "converted")
    attach_guides(model, _dense(), "residual")
    run_dir = output_dir / "run"
    _train(model, train_data, eval_data, run_dir, max_steps, LEARNING_RATES["low-rank"])
    if (run_dir / "training.png").exists():
        (run_dir / "training.png").replace(output_dir / "training.png")

    _say("3. export, and load it again in a fresh process with AutoModelForCausalLM")
    final = output_dir / "finetuned"
    _save(model, final)
    rows.append(_row("fine-tuned low-rank", _reload_here(final), final, held_out))
    text = _reload_in_fresh_process(final, held_out, rows[-1])

    _say(f"4. for comparison, LoRA r={LORA_RANK} on the dense model, same steps and data")
    torch.manual_seed(0)  # its first factor is random
    lora: Any = get_peft_model(_dense(), LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear"))
    _train(lora, train_data, None, output_dir / "run-lora", max_steps, LEARNING_RATES["LoRA"])
    merged = lora.merge_and_unload()
    with whole_folder(output_dir / "lora-merged", overwrite=True) as folder:
        merged.to(torch.bfloat16).save_pretrained(folder)
        copy_companions(MODEL, folder)
    rows.append(_row(f"LoRA r={LORA_RANK}, merged", merged.float(), output_dir / "lora-merged", held_out))

    _measure_speed(rows, held_out)
    seconds = time.monotonic() - start
    _report(rows, output_dir, text, seconds)
    return rows


def _dense() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(MODEL), dtype=torch.float32)


def _train(
    model: Any, train_data: TokenizedData, eval_data: TokenizedData | None, folder: Path, max_steps: int, rate: float
) -> None:
    args = TrainArguments(
        output_dir=str(folder), overwrite_output_dir=True, max_steps=max_steps, learning_rate=rate, weight_decay=0.0,
        warmup_ratio=0.05, logging_steps=max(1, max_steps // 40), eval_steps=max(1, max_steps // 6), seed=0,
        load_best_model_at_end=False,
    )  # fmt: skip
    Trainer(model, args, train_data, eval_data).train()


def _save(model: Any, folder: Path) -> None:
    save_compact(
        model, folder, dtype=torch.bfloat16, companions_from=MODEL, base_model="lowrank-ft demo", overwrite=True
    )
    model.float()


def _reload_here(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


def _row(name: str, model: PreTrainedModel, folder: Path, held_out: torch.Tensor) -> Row:
    result = evaluate_blocks(model, held_out, progress=True)
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return Row(name, count_parameters(model), size, result.perplexity, model)


def _measure_speed(rows: list[Row], held_out: torch.Tensor, rounds: int = 3) -> None:
    """Forward tokens per second on the CPU, the best of a few rounds in turn, so that a busy moment hits no model alone."""
    for row in rows:
        row.model.to("cpu")  # a model that was trained may be on a GPU, those that were loaded are not
    for _ in range(rounds):
        for row in rows:
            speed = evaluate_blocks(row.model, held_out[:32]).tokens_per_second
            row.tokens_per_second = max(row.tokens_per_second, speed)


def _reload_in_fresh_process(folder: Path, held_out: torch.Tensor, row: Row) -> str:
    ids = folder.parent / "held-out.pt"
    torch.save(held_out, ids)
    command = [sys.executable, "-m", "lowrank_ft.demo.reload", str(folder), str(ids)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CheckpointError(f"{folder} does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    there, here = torch.tensor(answer["loss"]).exp().item(), row.perplexity
    if abs(there / here - 1) > 1e-4:
        raise CheckpointError(f"{folder} gives perplexity {there:.4f} in a fresh process, and {here:.4f} here")
    _say(f"   perplexity {there:.3f} there, {here:.3f} here")
    return str(answer["text"])


def _report(rows: list[Row], output_dir: Path, text: str, seconds: float) -> None:
    data = {"seconds": round(seconds, 1), "torch_threads": torch.get_num_threads(), "rows": [_numbers(r) for r in rows]}
    (output_dir / "demo.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    dense = rows[0]
    print_table(
        ("model", "parameters", "of dense", "on disk", "perplexity", "tokens/s"),
        [
            (r.name, human_count(r.parameters), f"{r.parameters / dense.parameters:.0%}", human_bytes(r.bytes),
             f"{r.perplexity:.2f}", f"{r.tokens_per_second:,.0f}")
            for r in rows
        ],
        title="Held-out perplexity on Python's help topics (lower is better)",
    )  # fmt: skip
    print(f"fine-tuned low-rank model, greedy: {text!r}" if text.startswith(PROMPT) else text)
    if (output_dir / "training.png").exists():
        print(f"plot of loss and alpha: {output_dir / 'training.png'}")
    else:
        print('no plot: matplotlib is missing (pip install "lowrank-ft[plot]")')
    print(f"compact checkpoint: {output_dir / 'finetuned'}   ({seconds:.0f} s in all)")


def _numbers(row: Row) -> dict[str, Any]:
    return {k: v for k, v in vars(row).items() if k != "model"}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
