"""The files that belong to a model beside its weights: tokenizer, processor, chat template, licence."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import torch

from lowrank_ft.checkpoints.format import CONVERSION_FILE, RANK_MAP_FILE
from lowrank_ft.checkpoints.source import RUN_FILE

# Of a source folder, everything is taken along but its weights, what describes them, and what a run left there.
_NOT_COMPANIONS = (
    ".*", "config.json", "README.md", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt",
    "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py", "metrics.jsonl", "training.png",
    RUN_FILE, "trainer_state.json", "adapter_config.json", CONVERSION_FILE, RANK_MAP_FILE, "report.html",
)  # fmt: skip
_COMPANION_FOLDERS = ("additional_chat_templates",)


def begin_run(output_dir: str | Path, source: Path, export_dtype: torch.dtype) -> None:
    """Put what an export of any checkpoint of a run will need into its folder, before the run starts."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    copy_companions(source, folder)
    run = {"export_dtype": str(export_dtype).removeprefix("torch.")}
    (folder / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path | None, target: Path) -> None:
    """Copy tokenizer, processor, generation and licence files that ``target`` does not have yet.

    The folders that sentence-transformers names in ``modules.json`` come whole, small weights of theirs included.
    """
    if source is None:
        return
    for path in sorted(source.iterdir()):
        wanted = path.is_file() and not any(fnmatch(path.name, p) for p in _NOT_COMPANIONS)
        if wanted and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    for name in [*_COMPANION_FOLDERS, *_sentence_transformers_folders(source)]:
        if (source / name).is_dir() and not (target / name).exists():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("*.bin", "*.py", ".*"))


def _sentence_transformers_folders(source: Path) -> list[str]:
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return [m["path"] for m in modules if m.get("path") and "/" not in m["path"] and ".." not in m["path"]]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
