"""Rows of text from a name on the Hub or from a local file: ``datasets`` reads them all."""

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset, load_dataset_builder

from lowrank_ft.errors import DataError, first_line
from lowrank_ft.reading import kind_of

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_WHOLE = {"sample_by": "document"}  # or every line would be one


def read_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """A dataset by Hub name or local folder, or a local file by its path; a text file is one row.

    Raises:
        DataError: it does not exist, or is of a kind that is not read.
    """
    path = Path(name).expanduser()
    if not name:
        raise DataError("no dataset is named; give --dataset a Hub name or a .txt, .jsonl or .parquet file")
    with reading(name):
        if path.is_file():
            builder = BUILDERS.get(path.suffix.lower())
            if builder is None:
                raise DataError(f"{path} has the file extension {path.suffix!r}; supported are {', '.join(BUILDERS)}")
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty")
            if builder != "parquet" and (bad := _first_bad_line(path)):  # json reads something all the same
                raise DataError(f"{path} is not UTF-8 text{bad}; save it as UTF-8")
            whole = _WHOLE if builder == "text" else {}
            pattern = glob.escape(str(path))
            try:
                return load_dataset(builder, data_files=pattern, split="train", **whole)
            except Exception:  # pyarrow wants every row of one shape
                if path.suffix.lower() != ".jsonl" or (found := _read_lines(path)) is None:
                    raise
                return found
        if path.is_dir():
            found = load_dataset_builder(str(path), config)
            return load_dataset(str(path), config, split=split, **(_WHOLE if found.name == "text" else {}))
        if path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~")):
            raise DataError(f"there is no file {path}; check the path")
        return load_dataset(name, config, split=split)


def _read_lines(path: Path) -> Dataset | None:
    """JSON lines of different shapes. A broken line is a row of nulls; None where not one line is an object.

    In a column whose values have no type in common, what is no string is kept as JSON.
    """
    rows: list[dict[str, Any]] = []
    # Unlike splitlines(), which also cuts at characters such as U+2028 inside of strings.
    for text in path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n"):
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        rows.append(row if isinstance(row, dict) else {})
    columns: dict[str, list[Any]] = {
        k: [row.get(k) for row in rows] for k in dict.fromkeys(k for row in rows for k in row)
    }
    for name, values in columns.items():
        try:
            Dataset.from_dict({name: values})
        except Exception:  # pyarrow's, of several kinds
            columns[name] = [v if isinstance(v, str) or v is None else json.dumps(v) for v in values]
    return Dataset.from_dict(columns) if columns else None


def require_column(name: str, wanted: Sequence[str], found: Iterable[str] | None, fix: str) -> None:
    """Raise a DataError, which says how to ``fix`` it, unless a dataset has one of the ``wanted`` columns."""
    columns = list(found or ())
    if not set(wanted) & set(columns):
        lacking = " and ".join(f"no column {column!r}" for column in wanted)
        raise DataError(f"{name} has {lacking}; it has {', '.join(columns)}; {fix}")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Anything that ``datasets`` raises becomes a DataError that names the source."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # its own, pyarrow's and the Hub's; all mean that it cannot be read
        causes = _causes(error)
        if any(isinstance(cause, UnicodeDecodeError) or "UTF8" in str(cause) for cause in causes):
            raise DataError(
                f"{name} is not UTF-8 text{_first_bad_line(Path(name).expanduser())}; save it as UTF-8"
            ) from error
        # Of a reader's error the reason is what it came from; itself it says no more than that there was one.
        wrapped = type(error).__name__ == "DatasetGenerationError"
        raise DataError(
            f"the dataset {name} cannot be read: {first_line(causes[min(int(wrapped), len(causes) - 1)])}"
        ) from error


def texts(rows: Dataset, column: str, name: str, skip_null: bool = False) -> Iterator[str]:
    """The texts of a column, one row after the other.

    Raises:
        DataError: a row holds something else; the dataset and the row are named. Null is skipped if that is wanted.
    """
    for number, text in enumerate(rows[column], start=1):
        if text is None and skip_null:
            continue
        yield require_text(text, number, column, name)


def require_text(value: Any, number: int, column: str, name: str) -> str:
    """A row's text, or a DataError that names dataset, row and column."""
    if not isinstance(value, str):
        raise DataError(
            f"{name}: row {number} has {kind_of(value)} in column {column!r}; each row must hold a text, so take that "
            "row out, or name another column"
        )
    return value


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from, the first cause last."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and cause not in found:
        found.append(cause)
    return found


def _first_bad_line(path: Path) -> str:
    """Where a file stops to be UTF-8; empty where it does not."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f" (line {number})"
    return ""
