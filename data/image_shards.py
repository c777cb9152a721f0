"""The data module for images in WebDataset shards: one image and, where known, its class number (`.cls`) a sample."""

import torch
from torch import Tensor

from data.faults import OnBadSample
from data.image_base import EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD, ImageModule, LabelledImages, decode
from data.images import statistics
from data.shards import ShardMembers, expand
from data.transforms import View


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

    Args:
        train: shards for training: a path, a glob, a range `path/train-{000000..000009}.tar`, or a list of these.
        val: the same for validation; None trains without.
        test: the same for testing.
        image_size: side of a full view, pixels.
        channels: 1 or 3; images are converted.
        transform: the views of training; None is SingleView().
        batch_size: samples in a micro-step over all devices together.
        bank_size: at most so many training images for nearest-neighbour and linear evaluation.
        max_val_samples: validate on at most so many images; None takes all.
        crop_ratio: in evaluation the shorter side is resized to image_size / crop_ratio and the centre is cropped.
        mean, std: of each channel in [0, 1]; None: ImageNet's.
        shuffle_block: neighbours in a shard that stay together while 16 such blocks are mixed; 0 shuffles freely.
        num_workers: loader processes for each device and loader; 0 reads in the training process.
        seed: of order, crops and augmentations; None: the run's (--seed_everything).
        on_bad_sample: "raise": an image that cannot be read ends the run; "skip": it is counted, and another one takes
            its place.

    Raises:
        UserError: options that make no sense; in `setup`, shards that are missing, damaged, empty or without images.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        image_size: int = 224,
        channels: int = 3,
        transform: View | None = None,
        batch_size: int = 64,
        bank_size: int = 4096,
        max_val_samples: int | None = None,
        crop_ratio: float = 1.0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        shuffle_block: int = 256,
        num_workers: int = 0,
        seed: int | None = None,
        on_bad_sample: OnBadSample = "raise",
    ) -> None:
        super().__init__(
            image_size=image_size,
            channels=channels,
            transform=transform,
            batch_size=batch_size,
            bank_size=bank_size,
            max_val_samples=max_val_samples,
            crop_ratio=crop_ratio,
            mean=mean or statistics(IMAGENET_MEAN, channels),
            std=std or statistics(IMAGENET_STD, channels),
            num_workers=num_workers,
            seed=seed,
            shuffle_block=shuffle_block,
            on_bad_sample=on_bad_sample,
        )
        self.patterns = {name: value for name, value in (("train", train), ("val", val), ("test", test)) if value}
        self._described: dict[str, str | int] = {}

    def prepare_data(self) -> None:
        """Build missing indices in one process of each machine before all of them read."""
        self._members()

    def _members(self) -> dict[str, ShardMembers]:
        return {name: ShardMembers(expand(value), EXTENSIONS) for name, value in self.patterns.items()}

    def read(self) -> dict[str, LabelledImages]:
        members = self._members()
        self._described = {
            "source": ", ".join(str(value) for value in self.patterns.values()),
            "shards": sum(len(part.paths) for part in members.values()),
            **{f"{name}_sha256": part.sha256() for name, part in members.items()},
        }
        return {
            name: LabelledImages(ShardImages(part, self.channels), torch.from_numpy(part.labels))
            for name, part in members.items()
        }

    def describe_source(self) -> dict[str, str | int]:
        return self._described
