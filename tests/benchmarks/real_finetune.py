"""A real chat model fine-tuned on GSM8K: full, LoRA, ours, and the two-step ways to a small model.

    PYTHONPATH=. python tests/benchmarks/real_finetune.py --model SMOLLM2 --work DIR

SmolLM2-135M-Instruct (``shared/tools/smollm2.py`` writes it) learns the answers of GSM8K's training questions, as chats in
its own template, with loss on the replies. Rates are chosen as in ``finetune.py``: a pilot of a quarter of the steps for each
rate of a grid, judged on chats that are not trained on; the peers that train the dense model get a second chance with
the second best rate. Each then runs in full, and is measured on chats of the test set (perplexity of the replies) and
on general text, for what it forgot. A run that is broken off goes on where it was.

The conversions that ours starts from are made by the command, on general text, and kept in DIR. "Converted on both" is on
general text and the training chats. "Fitted to the chats" is ``finetune`` from the dense model instead: a fit to the
chats, without training, and then the run.
"""

import argparse
import copy
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

from lowrank_ft.console import print_table
from lowrank_ft.data.encoding import token_ids
from lowrank_ft.data.examples import TokenizedData, pack
from lowrank_ft.evaluation.perplexity import summed_loss
from lowrank_ft.nn.modes import evaluating
from lowrank_ft.training.data import load_data
from lowrank_ft.training.options import DataArguments
from tests.benchmarks import common
from tests.benchmarks.finetune import Bench, draw, means, measure_all

RATIOS = (0.9, 0.8, 0.6)
_PILOT_CHATS = 48
_DENSE = (3e-5, 6e-5, 1.2e-4)
_ADAPTERS = (3e-4, 6e-4, 1.2e-3)


def chat_methods() -> dict[str, dict[str, Any]]:
    """Name to what it is, as in ``finetune.py``."""
    ours = "ours 0.8"
    table: dict[str, dict[str, Any]] = {
        "full fine-tuning": {"kind": "full", "grid": _DENSE},
        "LoRA r16": {"kind": "lora", "rank": 16, "grid": _ADAPTERS},
        "LoRA r64": {"kind": "lora", "rank": 64, "grid": _ADAPTERS},
        ours: {"kind": "ours", "ratio": 0.8, "guide": "residual", "grid": _DENSE},
    }
    for ratio in (0.9, 0.6):
        table[f"ours {ratio}"] = {"kind": "ours", "ratio": ratio, "guide": "residual", "rate_of": ours}
    for ratio in (0.8, 0.6):
        table[f"ours {ratio}, converted on both"] = {
            "kind": "ours", "ratio": ratio, "guide": "residual", "calibrated_on_both": True, "rate_of": ours,
        }  # fmt: skip
    table["ours 0.8, fitted to the chats"] = {"kind": "direct", "ratio": 0.8, "guide": "residual", "rate_of": ours}
    table["ours 0.8, distilled on general text"] = {
        "kind": "ours", "ratio": 0.8, "guide": "none", "distill": 0.5, "rate_of": ours,
    }  # fmt: skip
    for ratio in (0.6, 0.8):
        table[f"whitened SVD, then LoRA r16, {ratio}"] = {
            "kind": "svd-lora", "ratio": ratio, "grid": _ADAPTERS,
            "rate_of": "whitened SVD, then LoRA r16, 0.6",
        }  # fmt: skip
        table[f"LoRA r16, then whitened SVD, {ratio}"] = {
            "kind": "lora", "rank": 16, "compress": ratio, "rate_of": "LoRA r16",
        }  # fmt: skip
    return table


class ChatBench(Bench):
    """GSM8K as chats."""

    grid = _DENSE
    calibration_tokens = 16_384  # as many as the baseline of real_model.py has
    methods = staticmethod(chat_methods)

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.table = options, self.methods()
        self.compressed = dict[float, Any]()
        self.tokenizer = common.tokenizer_of(options.model)
        chats = self._chats("train")
        self.train, held_out = chats.split(_PILOT_CHATS)
        self.pilot_chats = list(held_out)
        test = self._chats("test")
        self.test_chats = [test[i] for i in range(min(options.test_chats, len(test)))]
        general = common.blocks_of(common.read_text(options.general), self.tokenizer, 512)
        self.general = general[torch.linspace(0, len(general) - 1, options.general_blocks).long()]
        self.other = pack(token_ids([common.read_text(options.other)], self.tokenizer), options.block_size)

    @staticmethod
    def calibration_data(options: argparse.Namespace, method: dict[str, Any]) -> list[str]:
        return [options.other, *([str(chats_file(options, "train"))] if method.get("calibrated_on_both") else [])]

    def build(self, method: dict[str, Any]) -> Any:
        if method["kind"] != "svd-lora":
            return super().build(method)
        ratio = method["ratio"]
        if ratio not in self.compressed:  # takes minutes, and its pilots all start from the same
            self.compressed[ratio] = self.dense()
            self.compress(self.compressed[ratio], ratio)
        return self.adapt(copy.deepcopy(self.compressed[ratio]), {"rank": 16}, ["U", "V"])

    def judge(self, model: Any) -> float:
        return reply_perplexity(model, self.pilot_chats)

    def measure(self, model: Any, form: str = "factors") -> dict[str, Any]:
        return {
            "parameters": common.stored_parameters(model, form),
            "test_perplexity": reply_perplexity(model, self.test_chats),
            "general_perplexity": common.perplexity(model, self.general),
            "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        }

    def _chats(self, part: str) -> TokenizedData:
        path = chats_file(self.options, part)
        args = DataArguments(dataset=str(path), eval_ratio=0, block_size=self.options.block_size)
        return load_data(args, self.tokenizer)[0]


def chats_file(options: argparse.Namespace, part: str) -> Path:
    """GSM8K's questions and answers as chats: ``train`` or ``test``."""
    path: Path = options.work / f"gsm8k-{part}.jsonl"
    if not path.is_file():
        rows = [json.loads(line) for line in (common.SHARED / "data" / path.name).open(encoding="utf-8")]
        chats = [[("user", r["question"]), ("assistant", r["answer"])] for r in rows]
        lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats]
        draft = path.with_suffix(f".{time.monotonic_ns()}")
        draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
        draft.replace(path)
    return path


@torch.no_grad()
def reply_perplexity(model: Any, chats: list[Any]) -> float:
    """Over the tokens of the replies, each given the chat before it."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for chat in chats:
            labels = chat["labels"][None]
            total += summed_loss(model(input_ids=chat["input_ids"][None]).logits, labels).item()
            tokens += int((labels[:, 1:] != -100).sum())
    return float(torch.tensor(total / tokens).exp())


def show(report: dict[str, Any]) -> None:
    dense = report["dense"]
    first = ("dense, not trained", f"{dense['parameters'] / 1e6:.0f} M", "", f"{dense['test_perplexity']:.3f}",
             f"{dense['general_perplexity']:.1f}", "", "")  # fmt: skip
    rows = [
        (
            r["method"], f"{r['parameters'] / 1e6:.0f} M", f"{r['learning_rate']:g}", f"{r['test_perplexity']:.3f}",
            f"{r['general_perplexity']:.1f}", f"{r['train_seconds'] / report['max_steps']:.1f}", f"{r['peak_bytes'] / 1e9:.1f}",
        )
        for r in report["rows"]
    ]  # fmt: skip
    print_table(
        ("method", "parameters", "rate", "replies", "general text", "s a step", "GB"), [first, *rows],
        title=f"SmolLM2-135M-Instruct on GSM8K, {report['tokens']:,} tokens at most: perplexity",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_common(parser)
    data = common.SHARED / "data"
    parser.set_defaults(data="GSM8K", block_size=256, seeds=[0], weight_decay=0.0, workers=1)
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="conversions are kept there")
    parser.add_argument("--general", default=str(data / "heldout.txt"), help="text to measure forgetting on")
    parser.add_argument("--other", default=str(data / "calibration.txt"), help="general text to convert and distil on")
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--test-chats", type=int, default=64)
    parser.add_argument("--general-blocks", type=int, default=8)
    parser.add_argument("--methods", nargs="+", help="only these, or those that begin so")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "real_finetune.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    report = measure_all(options, ChatBench)
    report["rows"] = means(report["rows"])
    show(report)
    draw(report, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
