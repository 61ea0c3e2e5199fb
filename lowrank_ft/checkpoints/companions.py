"""The files that belong to a model beside its weights: tokenizer, processor, chat template, licence."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_ft.checkpoints.files import RUN_FILE

if TYPE_CHECKING:
    import torch

# What tokenizers, processors and generation configs write by their own save_pretrained, and licences. Nothing else of a
# source folder is taken along: it may hold anything.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "vocab.bpe", "bpe.codes", "encoder.json", "normalizer.json", "entity_vocab.json", "*.model", "*.spm",
    "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
    "feature_extractor_config.json", "generation_config.json", "modules.json", "sentence_*_config.json",
    "config_sentence_transformers.json", "LICENSE", "LICENSE.*", "LICENCE", "LICENCE.*", "NOTICE", "NOTICE.*",
    "USE_POLICY.*", "COPYING", "COPYING.*",
)  # fmt: skip
COMPANION_FOLDERS = ("additional_chat_templates",)
# What a run and its export write beside weights, checkpoints and what says that it is a run, which is written anew.
_OF_A_RUN = ("README.md", "conversion.json", "training.png", "rank_map.png", "report.html")
_IN_FOLDERS = ("*.json", "*.safetensors", "*.jinja", "vocab.txt", "merges.txt", "*.model")


def begin_run(output_dir: str | Path, source: Path, export_dtype: "torch.dtype", resumes: bool = False) -> None:
    """Put what an export of any checkpoint of a run will need into its folder, before the run starts.

    Args:
        resumes: the run goes on with what is there. Otherwise the files of an earlier run are taken away first.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    earlier = any((folder / name).exists() for name in (RUN_FILE, "metrics.jsonl"))
    if earlier and not resumes:  # a tokenizer of another model would be taken for this one's
        for name in COMPANION_FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
        for path in [p for pattern in (*COMPANIONS, *_OF_A_RUN) for p in folder.glob(pattern) if not p.is_dir()]:
            path.unlink(missing_ok=True)
    copy_companions(source, folder)
    run = {"export_dtype": str(export_dtype).removeprefix("torch.")}
    (folder / RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path | None, target: Path) -> None:
    """Copy tokenizer, processor, generation and licence files that ``target`` does not have yet.

    The folders that sentence-transformers names in ``modules.json`` come, too, with small weights of theirs. A warning
    names those whose weights are pickles, which stay behind.
    """
    names = companions(source) if source is not None else []
    for name in names:
        assert source is not None
        if not (target / name).exists():
            (target / name).parent.mkdir(exist_ok=True)
            draft = target / f".{Path(name).name}.partial"  # half a tokenizer of a killed run would stay for good
            try:
                shutil.copyfile(source / name, draft)
                os.replace(draft, target / name)
            finally:
                draft.unlink(missing_ok=True)
    for part in _sentence_transformers_folders(source) if source is not None else ():
        assert source is not None
        pickles = sorted(p.name for p in (source / part).glob("*.bin"))
        if pickles and not any(n.startswith(f"{part}/") and n.endswith(".safetensors") for n in names):
            warnings.warn(
                f"{source / part} holds its weights as pickle only ({pickles[0]}), which is not copied, so "
                "sentence-transformers will not load the result; load the source with it, call save_pretrained, and convert "
                "what that wrote",
                stacklevel=3,
            )


def companions(folder: Path, more: Sequence[str] = ()) -> list[str]:
    """Names of the files in ``folder`` that belong to a model beside its weights, those in folders as ``folder/file``.

    Args:
        more: patterns of further files that count, in the folder itself.
    """
    wanted = (*COMPANIONS, *more)
    names = [p.name for p in sorted(folder.iterdir()) if matches(p.name, wanted) and is_own_file(p, folder)]
    for part in [*COMPANION_FOLDERS, *_sentence_transformers_folders(folder)]:
        inner = folder / part
        if inner.is_dir() and not inner.is_symlink():
            found = (p for p in sorted(inner.iterdir()) if matches(p.name, _IN_FOLDERS) and is_own_file(p, folder))
            names += [f"{part}/{p.name}" for p in found]
    return names


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_own_file(path: Path, folder: Path) -> bool:
    """Whether ``path`` is a regular file of ``folder``. A link that leads out of it is not, and a warning names it.

    A checkpoint of a stranger could link a tokenizer file to a private key of whoever converts and publishes it. The
    links of the Hub's cache, from ``snapshots/COMMIT`` to ``blobs`` of the same repository, are its own.
    """
    if not path.is_file():
        return False
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    if any(path.resolve().is_relative_to(home) for home in homes):
        return True
    warnings.warn(f"{path} is a link that leads out of its folder; it is left out", stacklevel=2)
    return False


def _sentence_transformers_folders(source: Path) -> list[str]:
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return [m["path"] for m in modules if re.fullmatch(r"\w[\w.-]*", m.get("path") or "")]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
