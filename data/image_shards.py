"""The data module for images in WebDataset shards: one image and, where known, its class number (`.cls`) a sample."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from data.image_base import EXTENSIONS, ImageModule, LabelledImages, decode
from data.image_sources import FOLDER_TRAITS
from data.images import statistics
from data.sampling import WINDOW
from data.shards import ShardMembers, ShardSplits
from moa_lightning.errors import UserError

log = logging.getLogger(__name__)

CLASS_NAMES = "class_names.json"  # beside shards: a list in the order of the class numbers
MOST_NAMES = 10_000_000  # bytes of that file


class ShardImages:
    """The images of several shards."""

    def __init__(self, members: ShardMembers, channels: int) -> None:
        self.members, self.channels = members, channels

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Tensor:
        return decode(
            self.members.read(index), self.channels, self.members.file(index), lambda: self.members.name(index)
        )


class ImageShards(ImageModule):
    """Images in tar shards, as `moa data images` writes them or as any WebDataset has them.

    A class_names.json beside the shards, a list, names the classes in the order of their numbers.

    Args:
        train: shards for training: a path, a glob, a range `path/train-{000000..000009}.tar`, or a list of these.
        val: the same for validation; None trains without.
        test: the same for testing.
        bank: labelled images for nearest-neighbour and linear evaluation; None: training images.
        image_size: side of a full view, pixels; None: 224.
        channels: 1 or 3; images are converted; None: 3.
        mean, std: of each channel in [0, 1]; None: ImageNet's.
        shuffle_block: neighbouring images that stay together while 16 such blocks are mixed; 0 shuffles freely. A fit
            warns of shards in class order, of which such batches hold few classes.
        options: `ImageModule`'s.

    Raises:
        UserError: options that make no sense; in `setup`, shards that are missing, damaged, empty or without images,
            or class names that are none or differ between folders.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        bank: str | list[str] | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        shuffle_block: int = 256,
        **options: Any,
    ) -> None:
        channels = FOLDER_TRAITS.channels if channels is None else channels
        super().__init__(
            image_size=FOLDER_TRAITS.image_size if image_size is None else image_size,
            channels=channels,
            mean=mean or statistics(FOLDER_TRAITS.mean, channels),
            std=std or statistics(FOLDER_TRAITS.std, channels),
            shuffle_block=shuffle_block,
            **options,
        )
        self.shards = ShardSplits(EXTENSIONS, train=train, val=val, test=test, bank=bank)

    def prepare_data(self) -> None:
        """Build missing indices in one process of each machine before all of them read."""
        if self.images_to_predict is None:
            self.shards.read()

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if stage in (None, "fit"):
            self._warn_of_order()

    @rank_zero_only
    def _warn_of_order(self) -> None:
        labels: Tensor = self.splits["train"].labels  # type: ignore[attr-defined]
        if len(labels) > WINDOW * self.shuffle_block > 0 and in_class_order(labels):
            log.warning(
                "the shards of data.train are in class order, and a batch from %d blocks of %d neighbours holds few "
                "classes: write them anew from the images with moa data images, which shuffles, or set "
                "data.shuffle_block to 0, which reads from all over the shards",
                WINDOW,
                self.shuffle_block,
            )

    def read(self) -> dict[str, LabelledImages]:
        members = self.shards.read()
        self.class_names = class_names({Path(path).parent for part in members.values() for path in part.paths})
        highest = max(int(part.labels.max()) for part in members.values())
        if self.class_names is not None and highest >= len(self.class_names):
            raise UserError(
                f"{CLASS_NAMES} beside the shards names {len(self.class_names)} classes, and class {highest} is among "
                "their numbers: name all classes or remove it"
            )
        return {
            name: LabelledImages(ShardImages(part, self.channels), torch.from_numpy(part.labels))
            for name, part in members.items()
        }

    def describe_source(self) -> dict[str, str | int]:
        return self.shards.facts


def class_names(folders: Iterable[Path]) -> list[str] | None:
    """What the classes of shards in these folders are called; None where no folder says so.

    Raises:
        UserError: a file that is not a list of different names, or two that are not the same.
    """
    found: dict[Path, list[str]] = {}
    for file in sorted(folder / CLASS_NAMES for folder in folders):
        if not file.is_file():
            continue
        try:
            names = json.loads(file.read_text()) if file.stat().st_size <= MOST_NAMES else None
        except (OSError, ValueError, RecursionError):
            names = None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
            raise UserError(f"{file} is not a JSON list of different class names: mend it or remove it")
        found[file] = names
    for file, names in found.items():
        first = next(iter(found))
        if names != found[first]:
            raise UserError(
                f"{first} and {file} name classes differently, so class numbers mean different things: write "
                "the shards from one source"
            )
    return next(iter(found.values()), None)


def in_class_order(labels: Tensor) -> bool:
    """Whether neighbours have the same label more often than half-way from by chance to always."""
    chance = (labels.unique(return_counts=True)[1] / len(labels)).square().sum()
    return bool((labels[1:] == labels[:-1]).float().mean() > (1 + chance) / 2)
