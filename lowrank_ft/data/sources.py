"""Rows of text from a name on the Hub or from a local file: ``datasets`` reads them all."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, load_dataset

from lowrank_ft.errors import DataError

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_TABLES = {".arrow", ".csv", ".json", ".jsonl", ".parquet"}


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
            extra = {"sample_by": "document"} if builder == "text" else {}
            return load_dataset(builder, data_files=str(path), split="train", **extra)
        if path.is_dir():
            endings = {p.suffix.lower() for p in path.rglob("*")}
            if ".txt" in endings and not endings & _TABLES:  # datasets would take every line of them for a document
                raise DataError(
                    f"{path} is a folder of text files; make token files of it (lowrank-ft tokenize {name} --tokenizer "
                    "TOKENIZER --output-dir tokens), or name one file"
                )
            return load_dataset(str(path), config, split=split)
        if path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~")):
            raise DataError(f"there is no file {path}; check the path")
        return load_dataset(name, config, split=split)


def require_column(name: str, wanted: Sequence[str], found: Iterable[str] | None, choose: str) -> None:
    """Raise a DataError unless a dataset has one of the ``wanted`` columns; ``choose`` says how to name another."""
    columns = list(found or ())
    if not set(wanted) & set(columns):
        lacking = " and ".join(f"no column {column!r}" for column in wanted)
        raise DataError(f"{name} has {lacking}; it has {', '.join(columns)}; choose with {choose}")


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
