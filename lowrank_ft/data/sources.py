"""Rows of text from a name on the Hub or from a local file: ``datasets`` reads them all."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, load_dataset, load_dataset_builder

from lowrank_ft.errors import DataError

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
                raise DataError(f"{path} has the ending {path.suffix!r}; the endings read are {', '.join(BUILDERS)}")
            if path.stat().st_size == 0:
                raise DataError(f"{path} is empty")
            if builder != "parquet":
                _require_utf8(path)
            whole = _WHOLE if builder == "text" else {}
            try:
                return load_dataset(builder, data_files=str(path), split="train", **whole)
            except Exception:  # pyarrow wants every row of one shape
                if path.suffix.lower() != ".jsonl":
                    raise
                return _read_lines(path) or load_dataset(builder, data_files=str(path), split="train")
        if path.is_dir():
            found = load_dataset_builder(str(path), config)
            return load_dataset(str(path), config, split=split, **(_WHOLE if found.name == "text" else {}))
        if path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~")):
            raise DataError(f"there is no file {path}; check the path")
        return load_dataset(name, config, split=split)


def _require_utf8(path: Path) -> None:
    """pyarrow reads other bytes, too, and fails much later."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}, line {number}, is not UTF-8; convert the file, with iconv for instance"
                ) from None


def _read_lines(path: Path) -> Dataset | None:
    """JSON lines of different shapes: what is no string is kept as JSON, and a broken line is a row of nulls.

    None where not one line is an object.
    """
    rows: list[dict[str, str | None]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        row = row if isinstance(row, dict) else {}
        rows.append({k: v if isinstance(v, str) or v is None else json.dumps(v) for k, v in row.items()})
    columns = {k: None for row in rows for k in row}
    return Dataset.from_list([{**columns, **row} for row in rows]) if columns else None


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
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"the dataset {name} cannot be read: {reason}") from error
