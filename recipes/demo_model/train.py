"""Train the small Llama that ships with the package (``lowrank_ft/demo/model``).

    python recipes/demo_model/train.py --output-dir build/demo-model

The text is the Python standard library's own source code, which every Python installation has, so the run needs no
download and the result carries nobody else's data. ``pydoc_data/topics.py`` is left out: it is English prose, and the
demo fine-tunes on it. The log next to this file is the one of the run that made the shipped weights.

It is a plain loop on purpose: about a hundred lines that can be read from top to bottom.
"""

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "pydoc_data", "site-packages"}
SKIPPED_FOLDERS |= {"encodings", "turtledemo", "__pycache__"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16, help="blocks per optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="blocks per forward pass")
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def standard_library_sources() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not SKIPPED_FOLDERS & set(p.relative_to(root).parts))
    return [text for p in files if (text := p.read_text(encoding="utf-8", errors="ignore").strip())]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS)


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str], block_size: int) -> torch.Tensor:
    """Concatenate the texts, an end-of-text token after each, and cut them into ``(blocks, block_size)``."""
    ids = np.concatenate([np.array([*tokenizer(t).input_ids, tokenizer.eos_token_id]) for t in texts])
    blocks = len(ids) // block_size
    return torch.from_numpy(ids[: blocks * block_size].reshape(blocks, block_size))


def learning_rate(step: int, args: argparse.Namespace) -> float:
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / (args.steps - args.warmup_steps)
    return args.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, blocks: torch.Tensor, batch_size: int) -> float:
    model.eval()
    losses = [model(input_ids=b, labels=b).loss.item() for b in blocks.split(batch_size) if len(b) == batch_size]
    model.train()
    return sum(losses) / len(losses)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    texts = standard_library_sources()
    held_out, train = texts[::40], [t for i, t in enumerate(texts) if i % 40]
    tokenizer = train_tokenizer(train)
    train_blocks = pack(tokenizer, train, args.block_size)
    eval_blocks = pack(tokenizer, held_out, args.block_size)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    log = (args.output_dir / "training_log.jsonl").open("w")

    def record(**entry: object) -> None:
        print(json.dumps(entry), file=log, flush=True)

    record(
        python=platform.python_version(), torch=torch.__version__, texts=len(texts), arguments={
            k: v for k, v in vars(args).items() if k != "output_dir"
        }, parameters=model.num_parameters(), train_tokens=train_blocks.numel(), eval_tokens=eval_blocks.numel(),
    )  # fmt: skip

    order = torch.Generator().manual_seed(args.seed)
    queue = torch.empty(0, dtype=torch.long)
    start = time.monotonic()
    for step in tqdm(range(args.steps), file=sys.stderr, disable=None):
        while len(queue) < args.batch_size:
            queue = torch.cat([queue, torch.randperm(len(train_blocks), generator=order)])
        batch, queue = train_blocks[queue[: args.batch_size]], queue[args.batch_size :]
        micro_batches = batch.split(args.micro_batch_size)
        total = 0.0
        for micro in micro_batches:
            loss = model(input_ids=micro, labels=micro).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step == 0:
            record(step=step + 1, loss=round(total, 4), seconds=round(time.monotonic() - start, 1))
        if (step + 1) % 400 == 0 or step + 1 == args.steps:
            held_out_loss = mean_loss(model, eval_blocks, args.micro_batch_size)
            record(step=step + 1, held_out_loss=round(held_out_loss, 4), perplexity=round(math.exp(held_out_loss), 3))
            model.save_pretrained(args.output_dir / "float32")

    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
