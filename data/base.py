"""What all data modules share: keyed samples, loaders, sizes, checks, and the start in the middle of an epoch.

A data set is map-style and is asked by key `(epoch, index)`; whatever is random about a sample is drawn from
`sample_seed(seed, epoch, index)`, which also travels in the batch for the objectives (masks, noise). The training
loader asks the Trainer how many batches it has processed since the very beginning and starts there: nothing about a
reader is saved, and a run can go on with another number of devices or workers. The total counter is used instead of
Lightning's epoch number because the latter is not yet corrected when a resumed run builds its loader. Use
`Trainer(use_distributed_sampler=False)`: batches are already shared among the devices.

A sample that cannot be read is fatal, or, with `on_bad_sample: skip`, its place is taken by another one that depends
on (seed, epoch, index) alone. So every rank keeps its number of steps, and what is trained on does not depend on the
number of devices or workers. In evaluation the place is marked as padding, which nobody counts. The batch lists such
faults under the key "faults", where there are any; a callback adds them up.
"""

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, get_args

import lightning as L
from lightning.pytorch.accelerators import CUDAAccelerator
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.data._utils import signal_handling

from data.faults import BAD, BadSample, Fault, OnBadSample, take_slow
from data.sampling import EvalBatches, Key, TrainBatches, check_batch_size
from data.subsets import check_train_fraction
from moa_lightning.errors import UserError
from moa_lightning.random import sample_seed

EVAL_SEED = 0
SUBSTITUTES = 100  # tried for a sample that cannot be read
WORKER_SECONDS = 1800.0  # that a worker process may take for a batch, before it counts as hanging


class Samples(Dataset[dict[str, Any]], ABC):
    """A map-style data set asked by key `(epoch, index)`.

    Args:
        seed: of everything random about the samples.
    """

    training: bool  # whether a sample in the place of a bad one counts
    ordered = False  # whether an epoch sees the samples in the order of their numbers, because that is already mixed
    on_bad_sample: OnBadSample = "raise"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        """Sample `index` as epoch `epoch` sees it; `seed` is its own for that epoch."""

    @abstractmethod
    def uncounted(self, sample: dict[str, Any]) -> dict[str, Any]:
        """The sample with its targets hidden, for padding."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        position = ~index if index < 0 else index
        seed = sample_seed(self.seed, epoch, position)
        found, sample, bad = self._readable(position, epoch, seed)
        counted = index >= 0 and (self.training or not bad)
        if not counted:
            sample = self.uncounted(sample)
        faults = [*(bad if index >= 0 else []), *take_slow()]  # padding is a sample that another rank counts
        return {**sample, "id": found if counted else -1, "seed": seed, "faults": faults}

    def _readable(self, position: int, epoch: int, seed: int) -> tuple[int, dict[str, Any], list[Fault]]:
        """The sample at a position or the one in its place: its index, itself, and the fault that was met."""
        faults: list[Fault] = []
        candidate = position
        for attempt in range(1, SUBSTITUTES + 1):
            try:
                return candidate, self.sample(candidate, epoch, seed), faults
            except BadSample as error:
                last = str(error)
                if self.on_bad_sample == "raise":
                    raise UserError(last) from error
                faults = faults or [(BAD, error.file)]
            candidate = sample_seed(seed, attempt, position) % len(self)
        raise UserError(f"{SUBSTITUTES} samples in a row could not be read, and the last error was: {last}")

    def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Samples to a batch, with the faults that were met on the way; None without samples."""
        if not samples:
            return None
        faults = [fault for sample in samples for fault in sample.pop("faults")]
        batch = self.collate(samples)
        return {**batch, "faults": faults} if faults else batch

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch."""
        return default_collate(samples)


class Loader(DataLoader):
    """A DataLoader that Lightning sees as resumable. Its state is empty: the position is arithmetic."""

    def __iter__(self) -> Any:
        """Batches. An earlier Trainer of this process may have taken torch's SIGCHLD handler away as it ended; torch is
        then told to set it again: without it a reader's death is noticed late, or as a broken connection."""
        if self.num_workers > 0 and not callable(signal.getsignal(signal.SIGCHLD)):
            signal_handling._SIGCHLD_handler_set = False
        return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class DataModule(L.LightningDataModule, ABC):
    """Base of the data modules: subclasses build the splits, this class makes loaders of them.

    Subclasses take these options as `**options` and hand them on; the command line reads them from here.

    Args:
        batch_size: samples in a micro-step over all devices together.
        num_workers: loader processes for each device and loader; 0 reads in the training process.
        seed: of order, window offsets, crops and augmentations in training; None: the run's (--seed_everything).
            Held-out samples always have EVAL_SEED, so that every run is judged on the same masks.
        shuffle_block: neighbouring samples that stay together while 16 such blocks are mixed, see
            `sampling.epoch_order`; 0 shuffles freely.
        on_bad_sample: what a sample does that cannot be read: "raise" ends the run, "skip" counts it and takes another
            one instead. Data that is missing or damaged when the run starts is fatal either way, as it would shift the
            numbers of the samples.
        train_fraction: share of the training data to train on, in (0, 1]. Which part does not depend on `seed`, a
            smaller one lies inside a larger one, and held-out data stay as they are.

    Raises:
        UserError: options that make no sense.
    """

    def __init__(
        self,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int | None = None,
        shuffle_block: int = 0,
        on_bad_sample: OnBadSample = "raise",
        train_fraction: float = 1.0,
    ) -> None:
        super().__init__()
        check_train_fraction(train_fraction)
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"{name} is {value} but must be at least {least}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        if on_bad_sample not in get_args(OnBadSample):
            raise UserError(f"on_bad_sample is {on_bad_sample!r}; choose from {', '.join(get_args(OnBadSample))}")
        self.shuffle_block = shuffle_block
        self.on_bad_sample = on_bad_sample
        self.train_fraction = train_fraction
        self.faults: list[Fault] = []  # met while the splits were built
        self.splits: dict[str, Samples] = {}

    @abstractmethod
    def build(self) -> dict[str, Samples]:
        """Read the source and return the splits "train" and, where not empty, "val" and "test" (and others)."""

    @abstractmethod
    def describe_source(self) -> dict[str, str | int]:
        """Where the data came from, after `setup`."""

    def setup(self, stage: str | None = None) -> None:
        """Build the splits once; called by the Trainer, or by hand without one.

        Raises:
            UserError: missing or unusable data, or a batch size that does not fit it.
        """
        if not self.splits:
            self.splits = self.build()
            for samples in self.splits.values():
                samples.on_bad_sample = self.on_bad_sample
        if stage in (None, "fit"):
            check_batch_size(self.train_samples, self.batch_size, self._rank_and_world_size()[1])

    @property
    def train_samples(self) -> int:
        """Samples in an epoch of training."""
        return self._size("train")

    @property
    def val_samples(self) -> int:
        """Samples in a validation."""
        return self._size("val")

    def _size(self, split: str) -> int:
        return len(self.splits[split]) if split in self.splits else 0

    def describe(self) -> dict[str, str | int]:
        """What a log should say about the data, after `setup`."""
        sizes: dict[str, str | int] = {f"{name}_samples": self._size(name) for name in ("train", "val", "test")}
        return {"data": type(self).__name__, **self.describe_source(), **sizes}

    def train_dataloader(self) -> Any:
        return self.train_loader(self.train_batches(self._position if self.trainer is not None else None))

    def train_batches(self, position: Callable[[int], Key] | None) -> TrainBatches:
        """The batches of this process; `position` says where a pass starts, see TrainBatches."""
        rank, world_size = self._rank_and_world_size()
        return TrainBatches(
            len(self.splits["train"]),
            self.batch_size,
            self.seed,
            rank,
            world_size,
            self.shuffle_block,
            position,
            self.splits["train"].ordered,
        )

    def train_loader(self, batches: Sampler[list[Key]]) -> Loader:
        """A loader of training samples."""
        return self._loader(self.splits["train"], batches)

    def val_dataloader(self) -> Any:
        """A loader of the validation split, or no loader where there is none."""
        return self.eval_loader("val") if "val" in self.splits else []

    def test_dataloader(self) -> Any:
        return self.eval_loader("test")

    def predict_dataloader(self) -> Any:
        return self.eval_loader("test")

    def eval_loader(self, split: str) -> Loader:
        """Every sample of a split once, in order.

        Raises:
            UserError: the data has no such split.
        """
        if split not in self.splits:
            raise UserError(f"the data has no {split} split: give {split} data or a {split}_fraction above 0")
        sampler = EvalBatches(len(self.splits[split]), self.batch_size, *self._rank_and_world_size())
        return self._loader(self.splits[split], sampler)

    def _loader(self, samples: Samples, batches: Sampler[list[Key]]) -> Loader:
        return Loader(
            samples,
            batch_sampler=batches,
            collate_fn=samples.batch,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            timeout=WORKER_SECONDS if self.num_workers > 0 else 0,
            pin_memory=self.trainer is not None and isinstance(self.trainer.accelerator, CUDAAccelerator),
        )

    def _rank_and_world_size(self) -> tuple[int, int]:
        """This process's place among those that read different data (the data-parallel ones)."""
        share = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (share["rank"], share["num_replicas"]) if share else (0, 1)

    def _position(self, batches: int) -> Key:
        """(epoch, batch) where training goes on, from the number of batches that the Trainer has processed in all."""
        assert self.trainer is not None
        limit = self.trainer.limit_train_batches
        length = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        epoch, start = divmod(self._done(), max(1, length))
        # overfit_batches promises the same few batches again and again
        return (0 if self.trainer.overfit_batches else epoch), start  # type: ignore[attr-defined]

    def _done(self) -> int:
        """Batches that the Trainer has processed since the very beginning."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[union-attr]
