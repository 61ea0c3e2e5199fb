"""A conversion block by block that can be broken off: what is finished of it, in a hidden folder beside its output.

    .NAME.unfinished/state.json                  what is converted from what, and which blocks are done
    .NAME.unfinished/part-00003.safetensors      one block, as the output will have it
    .NAME.unfinished/hidden-00003/dense-0        what the next block receives

``state.json`` is replaced last, in one step, so it never names anything that is not there. A folder that was begun from
other weights or with other options is refused.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_ft.checkpoints.atomic import whole_file
from lowrank_ft.checkpoints.folders import where_it_leads
from lowrank_ft.checkpoints.locks import exclusive, explain_refused_writes
from lowrank_ft.errors import CheckpointError, OutputError
from lowrank_ft.reading import read_object

_STATE = "state.json"
_VERSION = 1


class Unfinished:
    """What is done of one conversion. Made by :func:`open_unfinished`, and told by :meth:`begin` what it is about.

    Args:
        writes: whether this process keeps it, or only reads what another one keeps.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self._writes = folder, writes
        self._state: dict[str, Any] = {"version": _VERSION, "key": None, "notes": {}, "parts": {}, "hidden": None}

    def begin(self, key: Mapping[str, Any]) -> bool:
        """Say what is converted, and how. Whether something of it is done.

        Raises:
            OutputError: something else was begun here.
            CheckpointError: what is in the folder cannot be read.
        """
        path = self.folder / _STATE
        wanted = json.loads(json.dumps(key))
        if path.is_file():
            found = read_object(path, CheckpointError)
            if found.get("version") != _VERSION or not isinstance(found.get("key"), dict):
                raise CheckpointError(f"{path} is damaged, or of another release; delete {self.folder} to begin anew")
            different = [k for k in wanted if found["key"].get(k) != wanted[k]]
            if different:
                what = different[0]
                raise OutputError(
                    f"{self.folder} holds an unfinished conversion with another {what} ({_short(found['key'].get(what))}, "
                    f"and now {_short(wanted[what])}); give what was given then, or delete the folder to begin anew"
                )
            self._state = found
            missing = [p["file"] for p in found["parts"].values() if not (self.folder / p["file"]).is_file()]
            if missing:
                raise CheckpointError(f"{self.folder} lacks {missing[0]}; delete the folder to begin anew")
        self._state["key"] = wanted
        self._write()
        return bool(self._state["parts"])

    def note(self, name: str, make: Any) -> Any:
        """What ``make()`` gave when it was asked for first: something that JSON can hold."""
        if name not in self._state["notes"]:
            self._state["notes"][name] = json.loads(json.dumps(make()))
            self._write()
        return self._state["notes"][name]

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What ``make()`` gave when it was asked for first: tensors by name, on their device the first time.

        Raises:
            OutputError: the disk is full.
        """
        path = self.folder / f"{name}.safetensors"
        if path.is_file():
            return load_file(path)
        made = dict(make())
        if self._writes:
            with (
                explain_refused_writes(self.folder, "Free some space, and the same command goes on"),
                whole_file(path) as draft,
            ):
                save_file({n: t.cpu().contiguous() for n, t in made.items()}, draft)
        return made

    def has(self, part: str) -> bool:
        return part in self._state["parts"]

    def facts(self, part: str) -> dict[str, Any]:
        """What was said of a part when it was added."""
        return dict(self._state["parts"][part]["facts"])

    @property
    def parts(self) -> dict[Path, list[str]]:
        """The files that are written, with the names of their tensors."""
        return {self.folder / p["file"]: p["tensors"] for p in self._state["parts"].values()}

    def add(
        self,
        part: str,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        hidden: Mapping[str, Iterable[Tensor]] | None = None,
    ) -> None:
        """Keep a finished part, and the hidden states that the next one starts from.

        Raises:
            OutputError: the disk is full.
        """
        number = len(self._state["parts"]) + 1
        before = self._state["hidden"]
        with explain_refused_writes(self.folder, "Free some space, and the same command goes on"):
            if hidden:
                self._state["hidden"] = self._keep(f"hidden-{number:05d}", hidden)
            file = self.folder / f"part-{number:05d}.safetensors"
            with whole_file(file) as draft:
                save_file(dict(tensors), draft, metadata={"format": "pt"})
            self._state["parts"][part] = {"file": file.name, "tensors": list(tensors), "facts": dict(facts)}
            self._write()
        if hidden and before is not None:
            shutil.rmtree(self.folder / before["folder"], ignore_errors=True)

    def hidden(self, name: str) -> Iterator[Tensor] | None:
        """The hidden states of that name with which the next part starts; None before the first."""
        kept = self._state["hidden"]
        if kept is None:
            return None
        folder, count = self.folder / kept["folder"], kept["counts"][name]
        return (load_file(folder / f"{name}-{i}.safetensors")["x"] for i in range(count))

    def remove(self) -> None:
        """It is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _keep(self, name: str, hidden: Mapping[str, Iterable[Tensor]]) -> dict[str, Any]:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        counts = {}
        for stream, tensors in hidden.items():
            counts[stream] = 0
            for i, x in enumerate(tensors):
                save_file({"x": x.detach().cpu().contiguous()}, folder / f"{stream}-{i}.safetensors")
                counts[stream] = i + 1
        return {"folder": name, "counts": counts}

    def _write(self) -> None:
        if not self._writes:
            return
        with whole_file(self.folder / _STATE) as draft:
            draft.write_text(json.dumps(self._state), encoding="utf-8")


@contextmanager
def open_unfinished(output_dir: str | Path, writes: bool = True) -> Iterator[Unfinished]:
    """The folder beside ``output_dir``, made where there is none. After an error it stays, for the next try.

    Args:
        writes: whether this process keeps it; one of those that work together does.

    Raises:
        OutputError: another command is at it, or it cannot be made.
    """
    path = where_it_leads(Path(output_dir))
    folder = path.parent / f".{path.name}.unfinished"
    if not writes:
        yield Unfinished(folder, writes=False)
        return
    busy = f"another command is converting to {path}; wait for it, or choose another --output-dir"
    with exclusive(folder.with_suffix(".unfinished.lock"), busy):
        try:
            folder.mkdir(exist_ok=True)
            yield Unfinished(folder)
        finally:
            if folder.is_dir() and not (folder / _STATE).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # nothing was begun


def fingerprint(files: Iterable[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by name."""
    found = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while chunk := handle.read(2**24):
                digest.update(chunk)
        found[file.name] = digest.hexdigest()
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
