"""Which samples form batch t of epoch e: one answer for every number of devices and workers.

A batch sampler yields keys `(epoch, index)` and nothing else, so that whatever is random about a sample can be drawn
from (seed, epoch, index) wherever it is read. Batches are cut globally and then shared: batch t is the same set of
samples on 1 device and on 8, and a device takes its contiguous slice. The place to start after a restart is arithmetic
(number of batches done), not the state of a reader. An index below zero marks padding: `~index` is the sample to read,
and it is not to be counted; it appears only in evaluation, where a last batch has fewer samples than there are devices.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

Key = tuple[int, int]
WINDOW = 16  # blocks that are mixed with each other


def epoch_order(size: int, seed: int, epoch: int, block: int = 0, window: int = WINDOW) -> Tensor:
    """The order in which an epoch visits samples 0..size-1.

    Args:
        size: number of samples.
        seed, epoch: what the permutation depends on.
        block: 0 permutes all samples freely. Otherwise blocks of this many neighbours are permuted, and then the
            samples inside every `window` consecutive blocks: reading stays within `window` regions of a file at a time.
        window: blocks that are mixed with each other.

    Returns:
        int64 (size,), a permutation.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, f"order of epoch {epoch}"))
    if not block:
        return torch.randperm(size, generator=generator)
    order, filled = torch.empty(size, dtype=torch.int64), 0  # written in place: a large text has millions of samples
    for number in torch.randperm(-(-size // block), generator=generator).tolist():
        start, stop = number * block, min((number + 1) * block, size)
        torch.arange(start, stop, out=order[filled : filled + stop - start])
        filled += stop - start
    for part in order.split(block * window):
        part.copy_(part[torch.randperm(len(part), generator=generator)])
    return order


class TrainBatches(Sampler[list[Key]]):
    """Shuffled global batches of an epoch, the last incomplete one dropped; yields this rank's slice of each.

    Args:
        size: number of samples.
        batch_size: samples in a global batch.
        seed: of the order.
        rank, world_size: which slice to yield.
        block: see `epoch_order`.
        position: called with the number of batches in an epoch at the start of every pass, returns (epoch, first
            batch). Without it the pass is the one chosen with `set_epoch`.
        ordered: take the samples by number instead of shuffled.

    Raises:
        UserError: the batch is larger than the data, or cannot be shared equally.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        block: int = 0,
        position: Callable[[int], Key] | None = None,
        ordered: bool = False,
    ) -> None:
        check_batch_size(size, batch_size, world_size)
        self.size, self.global_batch, self.seed, self.block = size, batch_size, seed, block
        self.share = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.position, self.ordered = position, ordered
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        """Batches in a full epoch, wherever the current one starts."""
        return self.size // self.global_batch

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch and the batch that the next pass starts with."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[Key]]:
        if self.position is not None:
            self.set_epoch(*self.position(len(self)))
        epoch = self.epoch
        order = torch.arange(self.size) if self.ordered else epoch_order(self.size, self.seed, epoch, self.block)
        for batch in range(self.start, len(self)):
            indices = order[batch * self.global_batch :][: self.global_batch]
            yield [(epoch, index) for index in indices[self.share].tolist()]


class StreamBatches(Sampler[list[Key]]):
    """Batches of one source of several that take part in the steps of a run, each at its own rate.

    The source runs through its own epochs, one after another, whatever an epoch of the run is: its n-th batch since the
    beginning is batch n mod length of its epoch n div length. In a step where it is not due, it yields an empty list.

    Args:
        batches: of the source.
        steps: of an epoch of the run.
        numerator, denominator: batches in so many steps; in step t the source is due where floor((t + 1) n / d) is
            above floor(t n / d), so that its turns are spread evenly. At most one batch a step.
        position: called with `steps` at the start of every pass, returns (step since the very beginning, first step in
            this epoch).
    """

    def __init__(
        self,
        batches: TrainBatches,
        steps: int,
        numerator: int,
        denominator: int,
        position: Callable[[int], tuple[int, int]],
    ) -> None:
        self.batches, self.steps, self.position = batches, steps, position
        self.numerator, self.denominator = numerator, denominator

    def __len__(self) -> int:
        """Steps in a full epoch, wherever the current one starts."""
        return self.steps

    def number(self, step: int) -> int:
        """Batches of the source before a step."""
        return step * self.numerator // self.denominator

    def __iter__(self) -> Iterator[list[Key]]:
        first, start = self.position(self.steps)
        batches = self._from(self.number(first))
        for step in range(first, first + self.steps - start):
            yield next(batches) if self.number(step + 1) > self.number(step) else []

    def _from(self, number: int) -> Iterator[list[Key]]:
        epoch, start = divmod(number, len(self.batches))
        while True:
            self.batches.set_epoch(epoch, start)
            yield from self.batches
            epoch, start = epoch + 1, 0


class EvalBatches(Sampler[list[Key]]):
    """Every sample once, in order, as epoch 0; the last batch may be smaller.

    All ranks yield the same number of batches, so that collective operations match: where a rank has no sample of the
    last batch, it gets one padding key.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.global_batch, self.rank, self.world_size = size, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.size // self.global_batch)

    def __iter__(self) -> Iterator[list[Key]]:
        for first in range(0, self.size, self.global_batch):
            count = min(self.global_batch, self.size - first)
            start, stop = (count * rank // self.world_size for rank in (self.rank, self.rank + 1))
            yield [(0, first + i) for i in range(start, stop)] or [(0, ~first)]


def check_batch_size(size: int, batch_size: int, world_size: int) -> None:
    """Raise UserError unless a global batch fits the data and divides among the devices."""
    if batch_size > size:
        raise UserError(
            f"batch_size is {batch_size} but the training data has only {size} samples: lower it or give more data"
        )
    if batch_size % world_size:
        raise UserError(
            f"batch_size is {batch_size}, the number of samples over all devices, and does not divide among "
            f"{world_size} devices: choose a multiple of {world_size}"
        )
