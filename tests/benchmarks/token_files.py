"""Token files against Hugging Face datasets: writing them, reading them, and going on after a kill.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tests/benchmarks/token_files.py --work DIR

The text is one jsonl file of some million tokens, made of the shared texts in a shuffled order. datasets is used as its
own examples do: ``map`` tokenizes, ``map`` groups the ids into blocks, ``save_to_disk`` writes Arrow files. Each of both
works in a process of its own, in one thread, and is then killed after half of that time and started again. Reading draws
the same random blocks in a further process.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lowrank_ft.console import print_table
from tests.benchmarks import common
from tests.benchmarks.measured import measured

BLOCK = 1024
DRAWN = 20_000
TEXTS = ("calibration.txt", "shakespeare.txt", "wikitext2-valid.txt")


def make_text(path: Path, megabytes: int) -> None:
    """Documents of some paragraphs each, until the file has its size."""
    if path.is_file():
        return
    paragraphs = [p for n in TEXTS for p in common.read_text(str(common.SHARED / "data" / n)).split("\n\n") if p]
    draw, written = random.Random(0), 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            written += file.write(json.dumps({"text": "\n\n".join(draw.choices(paragraphs, k=8))}) + "\n")


def write_with_datasets(text: str, tokenizer_name: str, folder: str) -> None:
    """What transformers' own language modelling example does, with two bytes for each token."""
    from datasets import Dataset, Features, List, Value, load_dataset

    tokenizer = common.tokenizer_of(tokenizer_name)
    features = Features({"input_ids": List(Value("uint16"))})

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        ids = [i for row in batch["input_ids"] for i in row]
        return {"input_ids": [ids[i : i + BLOCK] for i in range(0, len(ids) - BLOCK + 1, BLOCK)]}

    cache = str(Path(folder).with_suffix(".cache"))
    rows = load_dataset("json", data_files=text, split="train", cache_dir=cache)
    assert isinstance(rows, Dataset)
    rows = rows.map(encode, batched=True, remove_columns=["text"], features=features)
    rows.map(group, batched=True, features=features).save_to_disk(folder)


def read(kind: str, folder: str) -> None:
    """Draw blocks, as a shuffled epoch does; prints blocks a second and the sum of their ids, a proof of reading."""
    if kind == "token files":
        from lowrank_ft.data.tokens import TokenFiles

        data: Any = TokenFiles(folder, BLOCK, verify=False)
    else:
        from datasets import load_from_disk

        data = load_from_disk(folder).with_format("torch")
    draw = random.Random(0)
    start, total = time.perf_counter(), 0
    for _ in range(DRAWN):
        total += int(data[draw.randrange(len(data))]["input_ids"].sum())
    print(json.dumps({"blocks": len(data), "blocks_a_second": DRAWN / (time.perf_counter() - start), "sum": total}))


def killed_and_again(command: list[str], seconds: float, note: Path) -> float:
    """Seconds of the second run of a command that was killed after half of its ``seconds``."""
    try:
        subprocess.run(command, timeout=seconds / 2, capture_output=True)
        raise RuntimeError(f"it ended within {seconds / 2:.0f} s and could not be killed")
    except subprocess.TimeoutExpired:  # subprocess sends SIGKILL
        return measured(command, note)["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the text and what is made of it")
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--tokenizer", default=str(common.SHARED / "models" / "tiny-llama"))
    parser.add_argument("--output", type=Path, default=common.RESULTS / "token_files.json")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "text.jsonl"
    make_text(text, options.megabytes)
    own = [sys.executable, "-m", "lowrank_ft_cli.main", "tokenize", str(text), "--tokenizer", options.tokenizer,
           "--held-out", "0", "--max-shard-size", "8MB", "--output-dir"]  # fmt: skip
    call = "import sys; from tests.benchmarks.token_files import {0}; {0}(*sys.argv[1:])"
    theirs = [sys.executable, "-c", call.format("write_with_datasets"), str(text), options.tokenizer]
    rows = []
    for kind, write in (("token files", own), ("datasets", theirs)):
        folder, again = (options.work / (kind.replace(" ", "-") + suffix) for suffix in ("", "-again"))
        for path in (folder, again):
            shutil.rmtree(path.with_suffix(".cache"), ignore_errors=True)
            shutil.rmtree(path, ignore_errors=True)
        cost = measured([*write, str(folder)], folder.with_suffix(".json"))
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        cache = sum(p.stat().st_size for p in folder.with_suffix(".cache").rglob("*") if p.is_file())
        reading = [sys.executable, "-c", call.format("read"), kind, str(folder)]
        found = json.loads(subprocess.run(reading, check=True, capture_output=True, text=True).stdout)
        memory = measured(reading, folder.with_suffix(".reading.json"))["peak_bytes"]
        second = killed_and_again([*write, str(again)], cost["seconds"], again.with_suffix(".json"))
        rows.append({"kind": kind, **cost, "bytes": size, "cache_bytes": cache, **found, "reading_peak_bytes": memory,
                     "seconds_after_kill": second})  # fmt: skip
    report = {"machine": common.machine("cpu"), "text_bytes": text.stat().st_size, "block": BLOCK, "rows": rows}
    common.write_json(options.output, report)
    print_table(
        ("kind", "write", "peak", "on disk", "cache beside", "blocks/s", "peak, reading", "after a kill"),
        [(r["kind"], f"{r['seconds']:.0f} s", f"{r['peak_bytes'] / 1e6:.0f} MB", f"{r['bytes'] / 1e6:.0f} MB",
          f"{r['cache_bytes'] / 1e6:.0f} MB", f"{r['blocks_a_second']:,.0f}", f"{r['reading_peak_bytes'] / 1e6:.0f} MB",
          f"{r['seconds_after_kill']:.0f} s") for r in rows],
        title=f"{text.stat().st_size / 1e6:.0f} MB of text, blocks of {BLOCK}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
