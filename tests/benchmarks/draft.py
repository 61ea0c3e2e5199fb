"""A compact model as the draft of its dense original: the same output, and how long it takes.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/draft.py DENSE COMPACT...

Greedy replies to the package's first prompts, one at a time. CPU seconds, so other work does not count.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from lowrank_ft.console import print_table
from lowrank_ft.evaluation.drafting import draft
from lowrank_ft.evaluation.prompts import PROMPTS
from lowrank_ft.evaluation.talk import talk
from tests.benchmarks import common


def generate(model: Any, prompts: list[torch.Tensor], **options: Any) -> tuple[list[list[int]], float]:
    """The replies' ids, and CPU seconds per new token."""
    start, replies = time.process_time(), []
    for ids in prompts:
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=48, pad_token_id=0, **options)
        replies.append(out[0, ids.shape[1] :].tolist())
    return replies, (time.process_time() - start) / sum(map(len, replies))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("compact", nargs="+")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "draft.json")
    options = parser.parse_args()
    tokenizer, dense = common.tokenizer_of(options.dense), common.load(options.dense, "cpu")
    chosen = list(PROMPTS[: options.prompts])
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        for p in chosen
    ]
    generate(dense, prompts[:1])  # warms up
    alone, seconds = generate(dense, prompts)
    rows = []
    for folder in options.compact:
        compact = common.load(folder, "cpu")
        agreed = talk(compact, tokenizer, chosen, dense, max_new_tokens=48)["agreement"]["top1"]
        own = generate(compact, prompts)[1]
        for drafted in (1, 2, 4):
            compact.generation_config.num_assistant_tokens = drafted
            compact.generation_config.num_assistant_tokens_schedule = "constant"
            compact.generation_config.assistant_confidence_threshold = 0.0
            together, assisted = generate(dense, prompts, assistant_model=compact)
            rows.append({
                "compact": Path(folder).name, "drafted": drafted, "acceptance": agreed, "cost": own / seconds,
                "predicted_best": draft(agreed, own / seconds).speed_up, "speed_up": seconds / assisted,
                "same_output": together == alone,
            })  # fmt: skip
            print(rows[-1], flush=True)
    common.write_json(options.output, {"machine": common.machine("cpu"), "prompts": len(chosen), "rows": rows})
    print_table(
        ("draft", "tokens drafted", "accepted", "its time per token", "times as fast", "predicted, at best", "same output"),
        [(r["compact"], str(r["drafted"]), f"{r['acceptance']:.0%}", f"{r['cost']:.2f}", f"{r['speed_up']:.2f}",
          f"{r['predicted_best']:.2f}", str(r["same_output"])) for r in rows],
    )  # fmt: skip


if __name__ == "__main__":
    main()
