"""A corpus as a stream of pieces of text that can be left and taken up again at any piece.

    for piece in Corpus(["books/", "owner/name"]).pieces(start):
        ...piece.text...
        position = piece.after        # JSON; Corpus(...).pieces(position) goes on behind this piece

Nothing is held but the document at hand, and of a long one not even that: a text file is read, and any document cut,
in pieces of at most ``PIECE`` characters that end where a line ends. ``datasets`` streams json(l), parquet and the Hub.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from datasets import load_dataset_builder

from lowrank_ft.data.sources import BUILDERS, reading, require_column
from lowrank_ft.errors import DataError
from lowrank_ft.schedule import hash_fraction

PIECE = 2**18
"""Characters. Tokens of a longer document may differ, at the cuts only, from those of the document in one piece."""


class Position(NamedTuple):
    """Where a stream goes on.

    Attributes:
        source: index of the source.
        state: the source's own state before the document at hand; None at its beginning.
        pieces: pieces of that document that are done.
    """

    source: int = 0
    state: Any = None
    pieces: int = 0


_START = Position()


@dataclass(frozen=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        text: not empty.
        begins, ends: whether it is the first, and the last, of its document.
        draw: a number in [0, 1) that is a hash of the document's text (of its first piece), so that equal documents
            fall on the same side of any threshold.
        after: the position behind this piece.
    """

    text: str
    begins: bool
    ends: bool
    draw: float
    after: Position


class _Document(NamedTuple):
    chunks: Iterable[str]
    before: Any
    after: Any


class _Source(Protocol):
    name: str

    def version(self) -> Any:
        """What changes with the content, for a resumed run to compare; JSON."""

    def documents(self, state: Any) -> Iterator[_Document]:
        """Documents from ``state`` on; None: from the first."""


class Corpus:
    """Documents of files, folders and datasets on the Hub, in an order that depends on nothing else.

    Args:
        names: files, folders, glob patterns, or names on the Hub.
        globs: in folders, the files to read, such as ``*.py``; default: by the file extensions of text, json(l) and parquet.
            Files that match and have another ending are read as plain text. Hidden files and folders are left out.
        exclude: in folders, names of files and folders to leave out, such as ``site-packages`` or ``test_*``.
        column: of json(l), parquet and the Hub: the column with the text.
        config, split, revision, token: of datasets on the Hub.

    Raises:
        DataError: a name that leads to nothing, a file of unknown kind, or one that is named twice.
    """

    def __init__(
        self, names: Sequence[str], globs: Sequence[str] = (), exclude: Sequence[str] = (), column: str = "text",
        config: str | None = None, split: str = "train", revision: str | None = None, token: str | None = None,
    ) -> None:  # fmt: skip
        self.sources: list[_Source] = []
        self.names, self._globs = list(names), globs
        self._reading = {"text column": column, "config": config, "split": split}
        seen: set[Path] = set()
        for name in names:
            files = _files(name, globs, exclude)
            if files is None:
                self.sources.append(_Table(name, name, column, config, split, revision, token))
                continue
            for file in files:
                if file.resolve() in seen:
                    raise DataError(f"{file} is named twice; name each file once")
                seen.add(file.resolve())
                table = BUILDERS.get(file.suffix.lower(), "text") != "text"
                self.sources.append(_Table(str(file), BUILDERS[file.suffix.lower()], column) if table else _Text(file))

    def reading(self) -> dict[str, Any]:
        """What decides which text of the sources is read; nothing where they are plain text."""
        return self._reading if any(isinstance(source, _Table) for source in self.sources) else {}

    def versions(self) -> dict[str, Any]:
        """Of every source what changes with its content: size and time of a file, the commit of a Hub dataset."""
        return {source.name: source.version() for source in self.sources}

    def would_read(self, path: Path) -> bool:
        """Whether a file of that path would be part of this corpus, which an output should never be."""
        folders = [Path(name).expanduser() for name in self.names]
        return any(f.is_dir() and path.resolve().is_relative_to(f.resolve()) for f in folders) and _wanted(
            path, self._globs
        )

    def undecodable(self) -> list[str]:
        """Text files, of those read so far, with bytes that are not UTF-8."""
        return [source.name for source in self.sources if getattr(source, "replaced", False)]

    def pieces(self, start: Position = _START) -> Iterator[Piece]:
        """All pieces from ``start`` on; empty documents have none.

        Raises:
            DataError: a source cannot be read, or has no column of text of that name.
        """
        for number in range(start.source, len(self.sources)):
            state, skip = (start.state, start.pieces) if number == start.source else (None, 0)
            for document in self.sources[number].documents(state):
                draw = 0.0
                for count, (text, ends) in enumerate(cut(document.chunks)):
                    if count == 0:
                        draw = hash_fraction(text.encode("utf-8", "replace"))
                    if text and count >= skip:
                        after = (document.after, 0) if ends else (document.before, count + 1)
                        yield Piece(text, count == 0, ends, draw, Position(number, *after))
                skip = 0


def cut(chunks: Iterable[str], size: int = PIECE) -> Iterator[tuple[str, bool]]:
    """Pieces of at most ``size`` characters that end with a line where one ends, and whether each is the last."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > size:
            end = rest.rfind("\n", 0, size) + 1 or size
            yield rest[:end], False
            rest = rest[end:]
    yield rest, True


class _Text:
    """A file that is one document."""

    def __init__(self, path: Path) -> None:
        self.path, self.name, self.replaced = path, str(path), False

    def version(self) -> Any:
        return _file_version(self.path)

    def documents(self, state: Any) -> Iterator[_Document]:
        if state is None:
            yield _Document(self._chunks(), None, "read")

    def _chunks(self) -> Iterator[str]:
        try:
            with self.path.open(encoding="utf-8", errors="replace") as file:
                while chunk := file.read(PIECE):
                    self.replaced |= "\ufffd" in chunk
                    yield chunk
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error


class _Table:
    """Rows with a column of text: a local file, or a dataset on the Hub."""

    def __init__(
        self, name: str, builder: str, column: str, config: str | None = None, split: str = "train",
        revision: str | None = None, token: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.column, self.split = name, column, split
        self._local = builder != name
        options = (
            {"data_files": glob.escape(name)} if self._local else {"name": config, "revision": revision, "token": token}
        )
        self._builder_options = {"path": builder, **options}

    def version(self) -> Any:
        if self._local:
            return _file_version(Path(self.name))
        with reading(self.name):
            return load_dataset_builder(**self._builder_options).hash  # of a Hub dataset, its commit

    def documents(self, state: Any) -> Iterator[_Document]:
        with reading(self.name):
            rows = load_dataset_builder(**self._builder_options).as_streaming_dataset(split=self.split)
            if rows.column_names and self.column in rows.column_names:
                rows = rows.select_columns([self.column])
            if state is not None:
                rows.load_state_dict(state)
            before = state
            for row in rows:
                after = rows.state_dict()
                if text := self._text(row):
                    chunks = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
                    yield _Document(chunks, before, after)
                before = after

    def _text(self, row: dict[str, Any]) -> str:
        if self.column not in row:  # asked here first, for this runs once per document
            require_column(self.name, [self.column], row, "choose with --text-column")
        text = row[self.column]
        if text is not None and not isinstance(text, str):
            raise DataError(f"the column {self.column!r} of {self.name} holds {type(text).__name__} and not text")
        # A lone surrogate, which JSON can spell, is no character, and tokenizers refuse it.
        return (text or "").encode("utf-8", "replace").decode("utf-8")


def _files(name: str, globs: Sequence[str], exclude: Sequence[str]) -> list[Path] | None:
    """The files that a name means, in order; None where it is one on the Hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        files = [f for f in _walk(path, exclude) if _wanted(f.relative_to(path), globs)]
        if not files:
            wanted = ", ".join(globs or [f"*{ending}" for ending in BUILDERS])
            raise DataError(f"the folder {path} holds no file that matches {wanted}; say which with --glob '*.py'")
        return files
    if path.is_file():
        if path.suffix.lower() not in BUILDERS and not any(path.match(g) for g in globs):
            raise DataError(
                f"{path} has the file extension {path.suffix!r}; supported are {', '.join(BUILDERS)}; to read it as "
                f"plain text, add --glob '*{path.suffix}'"
            )
        return [path]
    if any(c in name for c in "*?["):
        found = sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file())
        if not found:
            raise DataError(f"no file matches {name}; check the pattern")
        return [file for match in found for file in _files(str(match), globs, exclude) or []]
    if not name or path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~")):
        raise DataError(f"there is no file or folder {name or '(empty name)'}; check the path")
    return None


def _walk(folder: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Files below, sorted by name in each folder; without hidden ones."""
    left_out = (".*", *exclude)
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not any(fnmatchcase(f, e) for e in left_out))
        yield from (Path(root, f) for f in sorted(files) if not any(fnmatchcase(f, e) for e in left_out))


def _wanted(path: Path, globs: Sequence[str]) -> bool:
    return any(path.match(g) for g in globs) if globs else path.suffix.lower() in BUILDERS


def _file_version(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns]
