"""Several processes that convert one model together, as ``torchrun`` or ``accelerate launch`` starts them.

Each has the weights, or reads the same block, and a part of the rows of every batch of calibration data. So what is a sum
over tokens (moments, gradients, losses) is the sum over processes, and the result is that of one process but for the
order of additions. What is no such sum is dealt out: a linear is factorized by one process, which sends its factors to
the others.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lowrank_ft.errors import ConfigError

T = TypeVar("T")

# A launcher ends all processes when one of them fails, so nobody waits for the dead; a large file takes hours to write.
_PATIENCE = timedelta(hours=24)


@dataclass(frozen=True)
class Processes:
    """Which of ``count`` processes this one is. All of them have to make the same calls in the same order.

    Attributes:
        rank: from 0. The first one, ``main``, prints and writes.
        device: where tensors are sent from, and arrive.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        return self.rank == 0

    def rows(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows of a batch.

        Raises:
            ConfigError: there is none for one of the processes, or the arguments have different numbers of rows.
        """
        if self.count == 1:
            return dict(batch)
        lengths = {len(v) for v in batch.values()}
        if len(lengths) > 1:
            raise ConfigError(
                f"a batch of {', '.join(batch)} with {sorted(lengths)} rows cannot be dealt to {self.count} processes; "
                "convert in one process"
            )
        if min(lengths) < self.count:
            raise ConfigError(
                f"a batch of {min(lengths)} rows cannot be dealt to {self.count} processes; start at most {min(lengths)}"
            )
        return {k: v.tensor_split(self.count)[self.rank] for k, v in batch.items()}

    def add_up(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        if self.count == 1:
            return number
        # NCCL knows no numbers of the CPU, and MPS no float64.
        sum_ = torch.tensor(number, dtype=torch.float64, device=self.device)
        self.add_up(sum_)
        return sum_.item()

    def drawn(self, draw: Callable[[int], Tensor], rows: int) -> Tensor:
        """This process's rows of what ``draw(all rows)`` gives, so that random numbers do not depend on the processes."""
        if self.count == 1:
            return draw(rows)
        return draw(int(self.total(rows))).tensor_split(self.count)[self.rank]

    def whole(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order: what :meth:`rows` took apart."""
        if self.count == 1:
            return rows
        return torch.cat([self._sent(owner, (rows,))[0].to(rows.device) for owner in range(self.count)])

    def deal(
        self, items: Sequence[T], work: Callable[[T], tuple[Tensor, ...]]
    ) -> Iterator[tuple[T, tuple[Tensor, ...]]]:
        """``work(item)`` for all items in order, each done by one process and given to all."""
        if self.count == 1:
            yield from ((item, work(item)) for item in items)
            return
        for start in range(0, len(items), self.count):
            hand = items[start : start + self.count]
            mine = work(hand[self.rank]) if self.rank < len(hand) else ()
            for owner, item in enumerate(hand):
                yield item, self._sent(owner, mine)

    def collect(self, value: T) -> list[T]:
        """What each process has, by rank."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def agreed(self, value: T) -> T:
        """What the main process has."""
        return self.collect(value)[0]

    def wait(self) -> None:
        """Until all are here."""
        self.collect(None)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Inside, the main process is done before the others begin."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def _sent(self, owner: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mine = owner == self.rank
        shapes = [None if not mine else [(t.shape, t.dtype, t.device.type) for t in tensors]]
        distributed.broadcast_object_list(shapes, owner)
        found = []
        for i, (shape, dtype, kind) in enumerate(shapes[0] or []):
            place = self.device if kind != "cpu" else "cpu"
            tensor = tensors[i].contiguous() if mine else torch.empty(shape, dtype=dtype, device=place)
            distributed.broadcast(tensor, owner)
            found.append(tensor)
        return tuple(found)


ONE = Processes()
"""This process alone."""


def launched() -> int:
    """How many processes a launcher started; 1 where there is none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that a launcher started; :data:`ONE` where it is one. On a GPU, each takes one of its own."""
    if launched() == 1:
        yield ONE
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        device = f"cuda:{torch.cuda.current_device()}"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size(), device)
    finally:
        distributed.destroy_process_group()
