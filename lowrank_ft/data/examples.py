"""What a training step is fed: examples of token ids, how they become a batch, and which ones each step sees."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from torch import Tensor

from lowrank_ft.data.token_format import MappedTokens
from lowrank_ft.errors import ConfigError, DataError

DEFAULT_BLOCK_SIZE = 1024
IGNORED = -100
"""Label of a position that does not count, as everywhere in transformers."""


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


def pack(ids: np.ndarray, block_size: int, name: str = "the data") -> TokenizedData:
    """Cut into whole blocks of ``block_size``; what is left at the end is dropped.

    Raises:
        DataError: fewer tokens than one block.
    """
    blocks = len(ids) // block_size
    if blocks == 0:
        raise DataError(f"{name} has {len(ids)} tokens, less than one sequence of {block_size}; lower --block-size")
    return TokenizedData(ids[: blocks * block_size], np.arange(blocks + 1) * block_size)


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


def context_length(wanted: int | None, positions: int | None, name: str) -> int:
    """Tokens per block: what was asked for, or 1024, or all ``positions`` of the model if those are fewer.

    Raises:
        ConfigError: more than the model has positions for, or fewer than 2.
    """
    if wanted is None:
        return min(DEFAULT_BLOCK_SIZE, positions or DEFAULT_BLOCK_SIZE)
    if wanted < 2:
        raise ConfigError(f"block size {wanted} is too small; it must be 2 or more")
    if positions is not None and wanted > positions:
        raise ConfigError(f"block size {wanted} exceeds the {positions} positions of {name}; lower --block-size")
    return wanted
