"""Token files: a text, tokenized once, in files that are mapped into memory and never loaded whole.

    tokens/
        index.json               which tokenizer, how many tokens and documents, and every shard with size and checksum
        tokens-00000.safetensors two 1-D tensors of token ids, ``train`` and ``held_out``; uint16 or uint32
        tokens-00001.safetensors ...

All shards' ``train`` tensors end to end are the training text, each document followed by the end-of-text token; likewise
``held_out``. safetensors reads a slice of a tensor from the mapped file, so a block costs its own bytes and not those of
the file. A folder without ``index.json`` is not whole. ``token_writer.py`` writes these folders, this file reads
them, and ``tokens.py`` makes examples of them.
"""

import bisect
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lowrank_ft.errors import DataError

FORMAT = "lowrank_ft.tokens"
FORMAT_VERSION = 1
INDEX_FILE = "index.json"
PARTS = ("train", "held_out")


class MappedTokens:
    """The ids of one part of a folder as if they were one array: ``len`` and slices, over the borders of shards.

    Args:
        folder: what ``lowrank-ft tokenize`` wrote.
        part: ``train`` or ``held_out``.
        verify: read all files once and compare their checksums, about a second per GB; otherwise sizes and headers only.

    Raises:
        DataError: the folder is no whole folder of token files; or a file is missing, truncated, or altered.
    """

    def __init__(self, folder: str | Path, part: str = "train", verify: bool = True) -> None:
        if part not in PARTS:
            raise DataError(f"token files have no part {part!r}; the parts are {', '.join(PARTS)}")
        self.folder, self.part = Path(folder).expanduser(), part
        self.index = read_index(self.folder)
        check_files(self.folder, self.index, verify)
        self._ends = list(itertools.accumulate(shard["tokens"][part] for shard in self.index["shards"]))
        self._slices: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        """``(stop - start,)``, a copy in the dtype of the files."""
        start, stop, _ = span.indices(len(self))
        found = []
        shard = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[shard - 1] if shard else 0
            until = min(stop, self._ends[shard])
            if until > start:
                found.append(self._slice(shard)[start - first : until - first])
            start, shard = until, shard + 1
        return np.concatenate(found) if found else np.empty(0, dtype=self.index["dtype"])

    def checksum(self) -> str:
        """Of all tokens of the part, from the checksums in the index."""
        joined = " ".join(shard["sha256"] for shard in self.index["shards"])
        return f"sha256 of {self.part} {hashlib.sha256(joined.encode()).hexdigest()[:16]}"

    def _slice(self, shard: int) -> Any:
        if shard not in self._slices:
            path = self.folder / self.index["shards"][shard]["file"]
            self._slices[shard] = safe_open(path, framework="numpy").get_slice(self.part)
        return self._slices[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slices": {}}  # a process that loads data maps the files itself


def is_token_folder(path: str | Path) -> bool:
    """Whether a path is meant as a folder of token files: it has the index, or at least shards."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return False
    try:
        return bool(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")).get("format") == FORMAT)
    except (OSError, ValueError, AttributeError):
        return any(folder.glob("tokens-*.safetensors"))


def read_index(folder: Path) -> dict[str, Any]:
    """``index.json`` of a folder of token files.

    Raises:
        DataError: there is none, or it is of another kind or version, or garbled.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        what = "has no index.json" if folder.is_dir() else "does not exist"
        raise DataError(f"{folder} {what}, so it is no folder of token files; run lowrank-ft tokenize to its end")
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = (index["format"], index["format_version"])
        if kind != (FORMAT, FORMAT_VERSION):
            raise DataError(f"{path} is of {kind[0]} version {kind[1]}; this release reads {FORMAT} {FORMAT_VERSION}")
        if index["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {index['dtype']!r}")
        for shard in index["shards"]:
            if Path(shard["file"]).name != shard["file"] or not all(shard["tokens"][p] >= 0 for p in PARTS):
                raise ValueError(f"shard {shard['file']!r}")
            int(shard["bytes"]), str(shard["sha256"])
        for part in PARTS:
            if index["tokens"][part] != (total := sum(shard["tokens"][part] for shard in index["shards"])):
                raise ValueError(f"{index['tokens'][part]} {part} tokens, and {total} in the shards")
        if not {"name", "sha256", "vocab_size"} <= index["tokenizer"].keys() or not isinstance(
            index["largest_id"], int
        ):
            raise ValueError("the tokenizer or the largest id")
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is incomplete or damaged ({error!r}); tokenize the text again") from error
    return index


def check_files(folder: Path, index: dict[str, Any], verify: bool) -> None:
    """Compare the files of a folder with its index.

    Raises:
        DataError: one is missing, truncated or altered.
    """
    again = "restore it from a copy, or tokenize the text again"
    for shard in index["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise DataError(f"{path} is missing, and {INDEX_FILE} names it; {again}")
        size = path.stat().st_size
        if size != shard["bytes"]:
            raise DataError(f"{path} has {size} bytes, and {INDEX_FILE} says {shard['bytes']}; it is damaged: {again}")
        if verify and (found := file_sha256(path)) != shard["sha256"]:
            raise DataError(
                f"{path} has the right size ({size} bytes) but other content: sha256 {found[:16]}..., expected "
                f"{shard['sha256'][:16]}...; {again}"
            )
        header = read_header(path)
        if header.get("largest_id", 0) > index["largest_id"]:
            raise DataError(
                f"{path} holds token ids up to {header['largest_id']}, and {INDEX_FILE} says {index['largest_id']}; {again}"
            )
        for key, expected in (
            ("dtype", index["dtype"]),
            ("tokenizer", index["tokenizer"]),
            ("tokens", shard["tokens"]),
        ):
            if header[key] != expected:
                raise DataError(f"{path} has {key} {header[key]}, and {INDEX_FILE} says {expected}; {again}")


def read_header(path: Path) -> dict[str, Any]:
    """What a shard says of itself, and ``tokens``, the lengths of its two tensors.

    Raises:
        DataError: it is truncated, or no shard of token files.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, Any] = json.loads(file.metadata()[FORMAT])
            if header["format_version"] != FORMAT_VERSION:
                raise DataError(
                    f"{path} has format version {header['format_version']}; this release reads {FORMAT_VERSION}"
                )
            return {**header, "tokens": {part: file.get_slice(part).get_shape()[0] for part in PARTS}}
    except DataError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) is truncated, or no token file ({error}); tokenize the text again"
        ) from error


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
