"""What a model has answered, on disk, so that a run that was killed goes on where it was.

One file for each model, ``NAME.jsonl``. The first line says what the answers depend on, and NAME is its hash: another
model, another dtype or another version has another file. Each later line holds the answers of one batch,
``{"key": answer, ...}``, written at once. A key is the hash of the question. No pickle: JSON alone.
"""

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from lowrank_ft.checkpoints.folders import check_writable
from lowrank_ft.data.encoding import text_ends
from lowrank_ft.errors import ConfigError, OutputError, first_line

FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "lm_eval", "lowrank_ft")


class Answers:
    """The answers of one model; a context, which keeps other processes out.

    Args:
        folder: made when needed.
        facts: what the answers depend on, from :func:`facts_of`.

    Raises:
        ConfigError: another process writes the same file.
        OutputError: the folder or the file cannot be written.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        header = {"format": "lowrank_ft answers", "format_version": FORMAT_VERSION, **facts}
        self._header = json.dumps(header, sort_keys=True)
        name = hashlib.sha256(self._header.encode()).hexdigest()[:32]
        self.path = Path(folder).expanduser() / f"{name}.jsonl"
        self._known: dict[str, Any] = {}
        self._lock = FileLock(self.path.with_suffix(".lock"), blocking=False)

    def __enter__(self) -> "Answers":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._read()
        except Timeout:
            raise ConfigError(
                f"--cache-dir {self.path.parent} is in use for this model by another run; wait for it, or name another"
            ) from None
        except OSError as error:
            self._lock.release()
            raise OutputError(
                f"--cache-dir {self.path.parent} cannot be used ({first_line(error)}); name another"
            ) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()

    def __len__(self) -> int:
        return len(self._known)

    def __bool__(self) -> bool:
        return True  # also when it is empty

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def get(self, key: str) -> Any:
        """The answer as JSON has it."""
        return self._known[key]

    def add(self, answers: Mapping[str, Any]) -> None:
        """Keep the answers of one batch: all of them are written, or none is."""
        self._known.update(answers)
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(answers).encode() + b"\n")
        except OSError as error:
            raise OutputError(
                f"--cache-dir: {self.path} cannot be written ({first_line(error)}); what is in it is kept"
            ) from None

    def _read(self) -> None:
        if not self.path.exists():
            self.path.write_text(self._header + "\n", encoding="utf-8")
            return
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines or lines[0] != self._header.encode():
            whole, lines = self._header.encode() + b"\n", []
        broken = 0
        for line in lines[1:]:
            try:
                self._known.update(json.loads(line))
            except (ValueError, TypeError):
                broken += 1
        if broken:
            print(f"note: {broken} lines of {self.path} are broken; their questions are asked again", file=sys.stderr)
        if whole != content:  # the run before was killed while it wrote
            self.path.write_bytes(whole)


def check_cache_dir(folder: str | Path) -> None:
    """Raise an OutputError, before any work is done, where no such folder can be made or written."""
    path = Path(folder).expanduser()
    if path.exists() and not path.is_dir():
        raise OutputError(f"--cache-dir {path} is a file; name a folder")
    check_writable(path)


def key_of(question: Any) -> str:
    """The name of a question: the hash of what the model is asked, plain lists, texts and numbers."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:32]


def facts_of(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """All that the answers of a model depend on, by content: a copy of it has the same facts.

    Where it came from plays no part, nor does the size of the batch, which changes what is rounded and no more.
    """
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "name_or_path", "transformers_version")}
    vocabulary = [sorted(tokenizer.get_vocab().items()), *text_ends(tokenizer)]
    parameter = next(model.parameters())
    return {
        "weights": _digest_of(model),
        "config": _sha256(json.dumps(config, sort_keys=True, default=str)),
        "tokenizer": _sha256(json.dumps(vocabulary)),
        "class": type(model).__qualname__,
        "code": _code_of(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }


def _digest_of(model: nn.Module) -> str:
    """Of every number in the model, by name, dtype and shape; also of those that a checkpoint does not hold."""
    digest = hashlib.sha256()
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    for name, value in sorted(tensors.items()):
        shown = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        digest.update(f"{name} {shown}\n".encode())
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _code_of(model: nn.Module) -> str:
    """The text of the file that defines the model: that of transformers, or what a checkpoint brings."""
    file = getattr(sys.modules.get(type(model).__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
