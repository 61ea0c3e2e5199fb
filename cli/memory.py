"""Memory: the table of ``lowrank-ft plan --memory``, and what is free here."""

import argparse
import os
from dataclasses import asdict
from typing import Any

import psutil
import torch

from lowrank_ft.console import human_bytes, print_table
from lowrank_ft.costs.memory import MODES, Architecture, Settings, estimate
from lowrank_ft.data.examples import context_length
from lowrank_ft.factorization.plan import Plan


def memory_of(plan: Plan, options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Peak memory of a training step in every mode, with the settings that it holds for."""
    settings = Settings(
        batch_size=options.batch_size,
        block_size=context_length(
            options.block_size, getattr(model.config, "max_position_embeddings", None), options.model
        ),
        dtype="float32" if options.dtype == "auto" else options.dtype,
        mixed_precision=options.mixed_precision,
        optim=options.optim,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        device=torch.device(options.device or "cuda").type,
    )
    architecture = Architecture.of(model)
    modes = [{"mode": m.name, **asdict(estimate(plan, architecture, m, settings))} for m in MODES]
    return {"settings": asdict(settings), "modes": modes}


def free_bytes(device: str) -> int:
    """Memory that nobody uses: of a GPU, or where ``device`` has none of its own, of the machine."""
    here = torch.device(device)
    if here.type == "cuda":
        return int(torch.cuda.mem_get_info(here)[0])
    return int(psutil.virtual_memory().available)


def processes_that_share(device: str) -> int:
    """How many of the processes of this run use the same memory: all on this machine where it is a CPU's, else one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if torch.device(device).type == "cpu" else 1


def print_memory(memory: dict[str, Any]) -> None:
    """One row for each mode."""
    settings, parts = memory["settings"], ("weights", "guide", "optimizer", "gradients", "activations", "peak")
    rows = [(m["mode"], *(human_bytes(m[p]) if m[p] else "" for p in parts)) for m in memory["modes"]]
    title = f"memory of training, {settings['batch_size']} x {settings['block_size']} tokens, {settings['dtype']}"
    if settings["mixed_precision"] != "no":
        title += f", {settings['mixed_precision']} arithmetic"
    print_table(("mode", *parts), rows, title=f"{title}, {settings['optim']}, on {settings['device']}")
    print(f"peak      of one process, tensors only; LoRA and QLoRA of rank {settings['lora_r']} on the same linears")
