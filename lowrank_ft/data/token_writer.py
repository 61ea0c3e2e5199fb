"""Write token files (see ``token_format.py``) from a stream of documents; a killed run goes on where it was.

The stream is cut into shards, one after the other. A shard holds the training *and* the held-out tokens of its stretch
of the stream, and its header says where the stream goes on behind it. So the finished shards are all that there is to
know of a run: to resume is to read the last header. Where a shard ends depends on the stream alone, so a resumed run
writes the same bytes.

    .tokens.partial/run.json     settings and inputs; a run that differs is refused
    .tokens.partial/tokens/      the finished shards; becomes tokens/ when the index is written
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lowrank_ft.checkpoints.atomic import take_place, whole_file
from lowrank_ft.checkpoints.folders import check_folder, check_replaceable, where_it_leads
from lowrank_ft.checkpoints.locks import exclusive
from lowrank_ft.console import progress_bar
from lowrank_ft.data.documents import Corpus, Piece, Position
from lowrank_ft.data.encoding import shown_tokenizer, text_ends, tokenizer_facts
from lowrank_ft.data.token_format import FORMAT, FORMAT_VERSION, INDEX_FILE, PARTS, file_sha256, read_header
from lowrank_ft.errors import ConfigError, DataError, OutputError

MAX_SHARD_BYTES = 128_000_000
_BATCH_CHARACTERS = 2**20
_BATCH_PIECES = 1024
_LEAST_SHARD_BYTES = 1000
_LISTED = 5
_LIBRARIES = ("datasets", "tokenizers", "transformers")  # which tokens come out, and the state of a stream, are theirs


@dataclass
class _Shard:
    """What becomes one file: token ids as bytes, and the number of documents that end in it."""

    dtype: str
    ids: dict[str, bytearray] = field(default_factory=lambda: {part: bytearray() for part in PARTS})
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    largest_id: int = 0

    def add(self, batch: list[tuple[str, bool, np.ndarray]]) -> None:
        for part, ends, ids in batch:
            self.ids[part] += ids.astype(self.dtype).tobytes()
            self.documents[part] += ends
            self.largest_id = max(self.largest_id, int(ids.max(initial=0)))

    @property
    def bytes(self) -> int:
        return sum(map(len, self.ids.values()))


def write_token_files(
    corpus: Corpus, tokenizer: Any, name: str, output_dir: str | Path, *, held_out: float = 0.01,
    max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Tokenize a corpus into ``output_dir``, which appears when it is whole; returns the content of its index.

    A run that was killed goes on when it is started again in the same way, and the files are the same byte for byte.
    Memory is bounded by about three shards and a batch of some million characters, whatever the size of the corpus.

    Args:
        tokenizer: of transformers, with an end-of-text token.
        name: what the files call it.
        held_out: share of the documents to hold out, chosen by a hash of their text.
        max_shard_bytes: of token ids per file. A batch of text whose tokens are more makes a larger one.
        overwrite: replace token files there, and drop what an unfinished run with other settings left.

    Raises:
        ConfigError: a number out of range.
        DataError: the corpus cannot be read, gives no training token, or the tokenizer has no end-of-text token.
        OutputError: ``output_dir`` may not be written; another process writes it; or an unfinished run there had other
            settings or inputs.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"--held-out is {held_out}; it must be at least 0 and below 1")
    if max_shard_bytes < _LEAST_SHARD_BYTES:
        raise ConfigError(f"--max-shard-size is {max_shard_bytes} bytes; it must be {_LEAST_SHARD_BYTES} or more")
    output_dir = Path(output_dir)
    check_folder(output_dir, overwrite, INDEX_FILE, (INDEX_FILE, "tokens-*.safetensors"), "token files")
    check_replaceable(output_dir)
    if corpus.would_read(output_dir / INDEX_FILE):
        raise OutputError(f"--output-dir {output_dir} is inside a folder that is read; write somewhere else")
    facts = tokenizer_facts(tokenizer, name)
    settings = {
        "tokenizer": facts, "dtype": "uint16" if facts["vocab_size"] <= 2**16 else "uint32", "held_out": held_out,
        "max_shard_bytes": max_shard_bytes, "format_version": FORMAT_VERSION,
        **{library: version(library) for library in _LIBRARIES},
    }  # fmt: skip
    run = {
        "settings": {**settings, **corpus.reading(), "tokenizer": shown_tokenizer(facts)},
        "inputs": corpus.versions(),
    }
    output_dir = where_it_leads(output_dir)
    work = output_dir.with_name(f".{output_dir.name}.partial")
    try:
        with exclusive(
            work.with_name(f"{work.name}.lock"), f"another process is tokenizing into {work}; wait for it, or end it"
        ):
            work.mkdir(exist_ok=True)
            folder = _begin(work, run, output_dir, overwrite)
            _write_shards(corpus, tokenizer, settings, folder, progress)
            index = _write_index(folder, settings, corpus)
            _take_place(folder, output_dir, work)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in one of its own
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"writing {output_dir} failed ({error}); finished files are kept, and the same command resumes from there"
        ) from error
    return index


def _write_shards(corpus: Corpus, tokenizer: Any, settings: dict[str, Any], folder: Path, progress: bool) -> None:
    headers = [read_header(p) for p in _shards(folder)]
    position = Position(*headers[-1]["position"]) if headers else Position()
    done = sum(sum(h["tokens"].values()) for h in headers)
    width = np.dtype(settings["dtype"]).itemsize
    bar = progress_bar(
        desc="tokenize", unit=" tokens", unit_scale=True, initial=done, progress=progress
    )  # fmt: skip
    shard = _Shard(settings["dtype"])
    for batch in _batches(corpus.pieces(position), settings["max_shard_bytes"] // width):
        encoded = _encode(batch, tokenizer, settings["held_out"])
        size = width * sum(len(ids) for _, _, ids in encoded)
        if shard.bytes and shard.bytes + size > settings["max_shard_bytes"]:
            _write_shard(folder, len(headers), shard, position, settings)
            headers.append({})
            shard = _Shard(settings["dtype"])
        shard.add(encoded)
        position = batch[-1].after
        bar.set_postfix_str(
            f"{len(headers)} shards, source {position.source + 1} of {len(corpus.sources)}", refresh=False
        )
        bar.update(size // width)
    if shard.bytes:
        _write_shard(folder, len(headers), shard, position, settings)
    bar.close()
    if undecodable := corpus.undecodable():
        warnings.warn(
            f"{len(undecodable)} text files hold bytes that are not UTF-8 and were read as U+FFFD (or hold that character), "
            f"the first being {undecodable[0]}",
            stacklevel=2,
        )


def _batches(pieces: Iterable[Piece], most_tokens: int) -> Iterator[list[Piece]]:
    """Enough text for the tokenizer to work on at once, and little against a shard."""
    most = min(_BATCH_CHARACTERS, most_tokens)
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        if batch and (characters + len(piece.text) > most or len(batch) == _BATCH_PIECES):
            yield batch
            batch, characters = [], 0
        batch.append(piece)
        characters += len(piece.text)
    if batch:
        yield batch


def _encode(batch: list[Piece], tokenizer: Any, held_out: float) -> list[tuple[str, bool, np.ndarray]]:
    """Of each piece its part, whether its document ends, and its ids ``(tokens,)``."""
    begin, end = text_ends(tokenizer)
    texts = [piece.text for piece in batch]
    found = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )["input_ids"]
    return [
        (
            "held_out" if piece.draw < held_out else "train",
            piece.ends,
            np.array([*(begin if piece.begins else []), *ids, *(end if piece.ends else [])], dtype=np.int64),
        )
        for piece, ids in zip(batch, found, strict=True)
    ]


def _write_shard(folder: Path, number: int, shard: _Shard, position: Position, settings: dict[str, Any]) -> None:
    path = folder / f"tokens-{number:05d}.safetensors"
    header = {
        "format_version": FORMAT_VERSION, "tokenizer": settings["tokenizer"], "dtype": settings["dtype"],
        "documents": shard.documents, "largest_id": shard.largest_id, "position": position,
    }  # fmt: skip
    tensors = {part: np.frombuffer(shard.ids[part], dtype=shard.dtype) for part in PARTS}
    with whole_file(path) as draft:
        # All in one entry: safetensors writes several in an order of its own each time.
        save_file(tensors, draft, metadata={FORMAT: json.dumps(header)})


def _write_index(folder: Path, settings: dict[str, Any], corpus: Corpus) -> dict[str, Any]:
    shards = []
    largest = 0
    for path in _shards(folder):
        header = read_header(path)
        largest = max(largest, header["largest_id"])
        shards.append({
            "file": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path),
            "tokens": header["tokens"], "documents": header["documents"],
        })  # fmt: skip
    total = {key: {part: sum(s[key][part] for s in shards) for part in PARTS} for key in ("documents", "tokens")}
    if not total["tokens"]["train"]:
        raise DataError(f"the text gives {total['tokens']['held_out']} held-out tokens and none to train on; "
                        "name more text, or lower --held-out")  # fmt: skip
    if settings["held_out"] and not total["documents"]["held_out"]:
        warnings.warn(
            f"of {total['documents']['train']} documents none was held out; a text file is one document, so "
            f"--held-out {settings['held_out']} needs many files, or rows of a dataset",
            stacklevel=2,
        )
    keys = ("tokenizer", "dtype", "held_out")
    index = {
        "format": FORMAT, "format_version": FORMAT_VERSION, **{key: settings[key] for key in keys},
        "largest_id": largest,
        "sources": [Path(n).name if Path(n).is_absolute() else n for n in corpus.names],
        **total,
        "shards": shards,
    }  # fmt: skip
    with whole_file(folder / INDEX_FILE) as draft:
        draft.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return index


# The folder, and who works in it


def _begin(work: Path, run: dict[str, Any], output_dir: Path, overwrite: bool) -> Path:
    """The folder for the shards; those of a run that was killed are there already."""
    record, folder = work / "run.json", work / "tokens"
    if record.is_file():
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = _differences(earlier["settings"], run["settings"]) + _differences(earlier["inputs"], run["inputs"])
        if not changed:
            folder.mkdir(exist_ok=True)
            for left in folder.glob(".*.partial"):  # what was being written when the run was killed
                left.unlink()
            return folder
        if not overwrite:
            more = f"; and {len(changed) - _LISTED} more" if len(changed) > _LISTED else ""
            raise OutputError(
                f"{work} holds an unfinished run that differs: {'; '.join(changed[:_LISTED])}{more}; use its settings, "
                "name another --output-dir, or add --overwrite to start anew"
            )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with whole_file(record) as draft:
        draft.write_text(json.dumps(run), encoding="utf-8")
    return folder


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``key old -> new`` of what is not equal."""
    now = json.loads(json.dumps(now))
    keys = [*before, *(k for k in now if k not in before)]
    return [
        f"{k} {before.get(k, 'not there')} -> {now.get(k, 'not there')}" for k in keys if before.get(k) != now.get(k)
    ]


def _take_place(folder: Path, output_dir: Path, work: Path) -> None:
    done = work / "done"  # under the name of the shards, what was replaced would be taken for those of this run
    shutil.rmtree(done, ignore_errors=True)
    os.replace(folder, done)
    take_place(done, output_dir)
    shutil.rmtree(work)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("tokens-*.safetensors"))
