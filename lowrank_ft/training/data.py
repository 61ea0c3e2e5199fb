"""Training data: plain text packed into blocks, or chats with loss on the replies only.

``datasets`` reads every source: a name on the Hub, or a local text, json(l) or parquet file. A text too large for that
is tokenized once by ``lowrank-ft tokenize``; the folder that it wrote is a source, too (``tokens.py``).
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from torch import Tensor

from lowrank_ft.errors import DataError
from lowrank_ft.evaluation import DEFAULT_BLOCK_SIZE, IGNORED
from lowrank_ft.training.config import DataArguments

if TYPE_CHECKING:
    from lowrank_ft.training.tokens import MappedTokens

BUILDERS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

Example = dict[str, Tensor]
"""``input_ids`` and ``labels``, each ``(length,)``."""


@dataclass(frozen=True)
class TokenizedData(torch.utils.data.Dataset):
    """Examples in memory, as int32 to halve their size, or in token files.

    Attributes:
        ids: token ids of all examples, end to end.
        starts: ``(examples + 1,)``, where each begins.
        counted: which tokens carry loss; None means all.
    """

    ids: "np.ndarray | MappedTokens"
    starts: np.ndarray | range
    counted: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        span = slice(self.starts[index], self.starts[index + 1])
        ids = torch.from_numpy(self.ids[span].astype(np.int64))
        labels = ids.clone()
        if self.counted is not None:
            labels[torch.from_numpy(~self.counted[span])] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def fingerprint(self) -> str:
        """Changes with any token of these examples, their borders, and which of them carry loss: data of a resumed run."""
        first, last = self.starts[0], self.starts[-1]
        if isinstance(self.ids, np.ndarray):
            crc = zlib.crc32(self.ids[first:last].tobytes(), zlib.crc32(np.asarray(self.starts).tobytes()))
            crc = crc if self.counted is None else zlib.crc32(self.counted[first:last].tobytes(), crc)
            checksum = f"crc32 {crc:08x}"
        else:
            checksum = f"from {first} on, {self.ids.checksum()}"
        return f"{len(self)} examples, {last - first} tokens, {checksum}"

    def split(self, held_out: int) -> "tuple[TokenizedData, TokenizedData]":
        """All but the last ``held_out`` examples, and those."""
        cut = len(self) - held_out
        first = TokenizedData(self.ids, self.starts[: cut + 1], self.counted)
        return first, TokenizedData(self.ids, self.starts[cut:], self.counted)


def collate(examples: list[Example]) -> Example:
    """Pad on the right to the longest; ``(batch, length)``. An attention mask comes only where there is padding."""
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        ids[row, :length] = example["input_ids"]
        labels[row, :length] = example["labels"]
        mask[row, :length] = 1
    batch = {"input_ids": ids, "labels": labels}
    return batch if bool(mask.all()) else {**batch, "attention_mask": mask}


class StepBatches:
    """Which examples each forward pass of each optimizer step sees: a pure function of seed and step.

    Epoch ``e`` is a permutation drawn from ``seed + e``; the epochs follow each other without a gap. Step ``s`` takes
    the next ``batch_size * accumulation * world_size`` examples, whichever way they are spread over forward passes
    and processes, so a resumed run, or one on another number of processes, sees the same examples in the same step.

    Args:
        first_step: the step to begin with.
        data_step: the step in the above sense whose examples a step sees; by default its own.
    """

    def __init__(
        self,
        examples: int,
        batch_size: int,
        accumulation: int,
        seed: int,
        rank: int,
        world_size: int,
        first_step: int,
        data_step: Callable[[int], int] = lambda step: step,
    ) -> None:
        self.examples, self.batch_size, self.accumulation = examples, batch_size, accumulation
        self.seed, self.rank, self.world_size, self.first_step = seed, rank, world_size, first_step
        self.data_step = data_step
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __iter__(self) -> Iterator[list[int]]:
        """Endless: ``accumulation`` lists of ``batch_size`` indices for this rank, then those of the next step."""
        for step in count(self.first_step):
            first_pass = self.data_step(step) * self.accumulation
            for number in range(first_pass, first_pass + self.accumulation):
                position = (number * self.world_size + self.rank) * self.batch_size
                yield [self._example(position + i) for i in range(self.batch_size)]

    def _example(self, position: int) -> int:
        epoch, offset = divmod(position, self.examples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.examples, generator=generator)
        return int(self._order[offset])


def load_data(args: DataArguments, tokenizer: Any) -> tuple[TokenizedData, TokenizedData | None]:
    """The training examples, and the held-out ones if there are any.

    Raises:
        DataError: the file or dataset does not exist, lacks the column, or has too little text; or token files are
            damaged or of another tokenizer.
    """
    train = _tokenized(args, args.dataset, args.dataset_config, args.dataset_split, tokenizer)
    if args.eval_dataset:
        return train, _tokenized(args, args.eval_dataset, args.dataset_config, args.eval_split, tokenizer, "held_out")
    if args.eval_ratio > 0 and _has_held_out(args.dataset):
        return train, _tokenized(args, args.dataset, None, "", tokenizer, "held_out")
    held_out = round(len(train) * args.eval_ratio)
    if args.eval_ratio > 0 and not 0 < held_out < len(train):
        raise DataError(
            f"{args.dataset} gives {len(train)} examples of {_block_size(args)} tokens, too few to hold out "
            f"{args.eval_ratio:.0%}; lower --block-size, give an --eval-dataset, or set --eval-ratio 0"
        )
    return train.split(held_out) if held_out else (train, None)


def load_distill_data(args: DataArguments, tokenizer: Any) -> TokenizedData | None:
    """The text on which the model is held to the dense one; None where that is the training data.

    Raises:
        DataError: as :func:`load_data`.
    """
    if not args.distill_dataset:
        return None
    return _tokenized(args, args.distill_dataset, args.distill_config, args.distill_split, tokenizer)


def read_rows(name: str, split: str = "train", config: str | None = None) -> Dataset:
    """A dataset by Hub name, or a local file by its path; a text file is one row.

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
        if path.suffix.lower() in BUILDERS or name.startswith((".", "/", "~")):
            raise DataError(f"there is no file {path}; check the path")
        return load_dataset(name, config, split=split)


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


def token_ids(texts: Iterable[str], tokenizer: Any) -> np.ndarray:
    """All texts' tokens in one array: each begins as the tokenizer begins a text, and ends with its end-of-text token."""
    begin, end = text_ends(tokenizer)
    pieces = []
    for text in texts:
        # Long documents are meant: the blocks are cut afterwards, so the length warning would mislead.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(np.array([*begin, *ids, *end], dtype=np.int32))
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)


def text_ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids with which the tokenizer begins a text, and its end-of-text token; empty where it has none."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    bos = tokenizer.bos_token_id
    begin = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    return begin, end


def pack(ids: np.ndarray, block_size: int, name: str = "the data") -> TokenizedData:
    """Cut into whole blocks of ``block_size``; what is left at the end is dropped.

    Raises:
        DataError: fewer tokens than one block.
    """
    blocks = len(ids) // block_size
    if blocks == 0:
        raise DataError(f"{name} has {len(ids)} tokens, less than one block of {block_size}; lower --block-size")
    return TokenizedData(ids[: blocks * block_size], np.arange(blocks + 1) * block_size)


def encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Token ids of a chat in the tokenizer's own template, and which of them belong to the assistant's replies.

    A template that marks replies itself (``{% generation %}``) is believed. Otherwise a reply is the text that the
    template adds to the chat before it with its generation prompt: what the model will have to write when it serves.

    Raises:
        DataError: the template is missing, or rewrites earlier turns when a later one is added.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template; use one that has, or train on --text-column")
    if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    replies = []
    for turn, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not text.startswith(after) or not after.startswith(before):
            raise DataError(
                "the chat template rewrites earlier turns, so replies cannot be told apart; "
                "use a template with {% generation %} marks"
            )
        replies.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    counted = [any(first <= start < last for first, last in replies) for start, _ in offsets]
    return list(encoded["input_ids"]), counted


def _block_size(args: DataArguments) -> int:
    return args.block_size or DEFAULT_BLOCK_SIZE


def _has_held_out(name: str) -> bool:
    from lowrank_ft.training.tokens import is_token_folder, read_index

    return is_token_folder(name) and read_index(Path(name).expanduser())["tokens"]["held_out"] > 0


def _tokenized(
    args: DataArguments, name: str, config: str | None, split: str, tokenizer: Any, part: str = "train"
) -> TokenizedData:
    from lowrank_ft.training.tokens import TokenFiles, is_token_folder  # it builds on this module

    if is_token_folder(name):
        part = part if _has_held_out(name) else "train"
        read_before = part == "held_out" and name == args.dataset
        data = TokenFiles(name, _block_size(args), part, verify=not read_before)
        data.check_tokenizer(tokenizer)
        return data
    rows = read_rows(name, split, config)
    columns = rows.column_names
    if args.messages_column in columns:
        return _tokenized_chats(rows[args.messages_column], name, tokenizer, _block_size(args))
    if args.text_column not in columns:
        raise DataError(
            f"{name} has no column {args.text_column!r} and no column {args.messages_column!r}; it has "
            f"{', '.join(columns)}; choose with --text-column or --messages-column"
        )
    texts = (text for text in rows[args.text_column] if text)
    return pack(token_ids(texts, tokenizer), _block_size(args), name)


def _tokenized_chats(chats: Iterable[Any], name: str, tokenizer: Any, most_tokens: int) -> TokenizedData:
    ids: list[np.ndarray] = []
    counted: list[np.ndarray] = []
    without_reply = 0
    for messages in chats:
        tokens, mask = encode_chat(list(messages), tokenizer)
        if not any(mask[1:most_tokens]):
            without_reply += 1
            continue
        ids.append(np.array(tokens[:most_tokens], dtype=np.int32))
        counted.append(np.array(mask[:most_tokens], dtype=bool))
    if not ids:
        raise DataError(
            f"none of the {without_reply} chats of {name} has an assistant's reply within {most_tokens} tokens; "
            "raise --block-size, or check the roles"
        )
    starts = np.concatenate([[0], np.cumsum([len(i) for i in ids])])
    return TokenizedData(np.concatenate(ids), starts, np.concatenate(counted))
