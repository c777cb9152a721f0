"""Image data sets and the base of the image modules: readers of pixels, views, normalisation, bank and query.

A reader returns one image as uint8 (C, H, W), from memory, a file or a shard. In training a sample is its views; in
evaluation it is the plain view, and validation hands out two loaders: the bank (training images, without augmentation)
and the query (validation images), which is what nearest-neighbour and linear evaluation compare. A source without test
images, such as ImageNet, is tested on all its validation images.
"""

import io
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import grayscale_to_rgb, rgb_to_grayscale

from data.base import EVAL_SEED, DataModule, Loader, Samples
from data.corruptions import MIDDLE, Corrupted, corruption_names
from data.faults import BadSample
from data.shards import UNLABELLED
from data.subsets import check_counts, describe_little, little_data, share
from data.transforms import SingleView, Transform, View, plain_view, seeded
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 89_478_485  # of an image: a quarter of a gigabyte as RGB, from where Pillow warns too
START_OF_SCAN, MAX_SCANS = b"\xff\xda", 100  # of a JPEG; progressive ones have about ten, and each costs a pass
TESTS_ON_VAL = "the data has no test split: the val images are the test images"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageReader(Protocol):
    """A sequence of images."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor:
        """uint8 (C, H, W)."""


class LabelledImages(NamedTuple):
    """One split as its source gives it."""

    images: ImageReader
    labels: Tensor  # int64 (N,), -1 where unknown

    def take(self, indices: Tensor) -> "LabelledImages":
        """The samples at these positions."""
        return LabelledImages(Selection(self.images, indices), self.labels[indices])


class Selection:
    """Some images of a reader, in a given order."""

    def __init__(self, images: ImageReader, indices: Tensor) -> None:
        self.images, self.indices = images, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[int(self.indices[index])]


def decode(content: bytes, channels: int, file: str, name: Callable[[], str]) -> Tensor:
    """An encoded image as uint8 (channels, H, W).

    The header is read first, so that a small file cannot claim a memory full of pixels.

    Raises:
        BadSample: the bytes are no image, or too large a one; `name` says which, and it is counted under `file`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if image.format == "JPEG" and content.count(START_OF_SCAN) > MAX_SCANS:
                raise BadSample(file, f"{name()} is drawn in more than {MAX_SCANS} scans: store it anew")
            # torchvision decodes JPEG in two thirds of Pillow's time, but dies of a damaged PNG (0.29: SIGSEGV), and of
            # an animated GIF it decodes all frames
            if image.format in ("PNG", "GIF"):
                return _pixels(image, channels)
        mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
        # bytearray: torch wants memory that it may write to
        return decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample(file, f"{name()} has more than {MAX_PIXELS:,} pixels: make it smaller") from error
    except Exception as error:  # decoders raise whatever their parsers raise
        what = f"{name()} ({len(content)} bytes) cannot be decoded as an image"
        raise BadSample(file, f"{what}: remove or repair it") from error


def _pixels(image: Image.Image, channels: int) -> Tensor:
    """What Pillow decodes, of several frames the first."""
    if image.mode.startswith("I;16"):  # Pillow itself would cut off what is above 255
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(pixels).view(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()


def with_channels(pixels: Tensor, channels: int) -> Tensor:
    """uint8 images (..., C, H, W) with 1 or 3 channels."""
    if pixels.shape[-3] == channels:
        return pixels
    return grayscale_to_rgb(pixels) if channels == 3 else rgb_to_grayscale(pixels)


class ImageSamples(Samples):
    """Images with one list of views each.

    Args:
        data: images and labels.
        transforms: one for each view.
        training: samples carry `views`; otherwise `image`, the only view.
        mean, std: of each channel, in [0, 1].
    """

    def __init__(
        self,
        data: LabelledImages,
        transforms: Sequence[Transform],
        training: bool,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        super().__init__(seed)
        self.images, self.labels = data
        self.transforms, self.training = transforms, training
        # normalising x / 255 is one multiply-add on the byte values
        self.scale = (1 / (255 * torch.tensor(std))).view(-1, 1, 1)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, epoch: int, seed: int) -> dict[str, Any]:
        image = self.images[index]
        with seeded(seed):
            views = [transform(image) for transform in self.transforms]
        return {"views": views, "label": int(self.labels[index])}

    def uncounted(self, sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "label": UNLABELLED}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples to a batch of normalised floats.

        Raises:
            UserError: images of different size, where the view does not make them equal.
        """
        shapes = {tuple(view.shape for view in sample["views"]) for sample in samples}
        if len(shapes) > 1:
            sizes = sorted(tuple(shape[0]) for shape in shapes)
            raise UserError(
                f"images of different size in one batch, {sizes[0]} and {sizes[-1]} (C, H, W): use a view that crops "
                "or resizes to one size, such as SingleView"
            )
        batch = default_collate(samples)
        views = [torch.addcmul(self.shift, view, self.scale) for view in batch.pop("views")]
        return {"views": views, **batch} if self.training else {"image": views[0], **batch}


class ImageModule(DataModule):
    """Base of the image modules.

    Args:
        image_size: side of a full view, pixels.
        channels: 1 or 3; images are converted.
        mean, std: of each channel in [0, 1], for normalisation.
        transform: the views of training; None is SingleView().
        batch_size: samples in a micro-step over all devices together.
        bank_size: at most so many training images (or labelled ones, where the source has a bank of its own) for
            nearest-neighbour and linear evaluation; None takes all.
        max_val_samples: validate on at most so many images; None takes all.
        crop_ratio: in evaluation the shorter side is resized to image_size / crop_ratio and the centre is cropped.
        per_class: train on so many labelled images of each class; None takes all. The bank is taken from them.
        imbalance: the largest class over the smallest, with counts that fall geometrically from class 0 to the last.
        subset_seed: of that choice of training images, and of `train_fraction`'s; apart from `seed`, so that runs with
            other seeds stay comparable. Validation and test images do not depend on it.
        corruption: what held-out images suffer in evaluation: the name of a corruption, or noise, blur, weather,
            digital, shift or all, of which each image draws one; None: nothing. The bank stays clean.
        severity: of the corruption, 1 to 5; without one it stays 3.
        options: `DataModule`'s. `train_fraction` is of what per_class and imbalance leave, and the same of each class;
            the bank does not shrink with it, so that all shares are judged alike.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        transform: View | None = None,
        batch_size: int = 64,
        bank_size: int | None = 4096,
        max_val_samples: int | None = None,
        crop_ratio: float = 1.0,
        per_class: int | None = None,
        imbalance: float = 1.0,
        subset_seed: int = 0,
        corruption: str | None = None,
        severity: int = MIDDLE,
        **options: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        check_counts(per_class, imbalance)
        if channels not in (1, 3):
            raise UserError(f"channels is {channels} but must be 1 (grey) or 3 (RGB)")
        if min(image_size, 1 if bank_size is None else bank_size, max_val_samples or 1) < 1 or not 0 < crop_ratio <= 1:
            raise UserError(
                f"image_size {image_size}, bank_size {bank_size} and max_val_samples {max_val_samples} must be "
                f"at least 1, and crop_ratio {crop_ratio} in (0, 1]"
            )
        if len(mean) != channels or len(std) != channels or min(std) <= 0:
            raise UserError(f"mean {mean} and std {std} must have {channels} numbers each, std above 0")
        self.image_size, self.channels = image_size, channels
        self.transform = transform or SingleView()
        self.bank_size, self.max_val_samples = bank_size, max_val_samples
        self.crop_ratio = crop_ratio
        self.per_class, self.imbalance, self.subset_seed = per_class, imbalance, subset_seed
        self.corruption, self.severity = corruption, severity
        self.corruptions = corruption_names(corruption, severity)
        self.training_images: str | None = None  # which of them are kept, in words
        self.tests_on_val = False  # whether the source has no test split
        self.mean, self.std = tuple(mean), tuple(std)
        self.class_names: list[str] | None = None
        self.images_to_predict: LabelledImages | None = None
        self.num_classes: int | None = None

    @abstractmethod
    def read(self) -> dict[str, LabelledImages]:
        """The splits "train" and, where there are any, "val" and "test"; "bank", where not training images are it."""

    def build(self) -> dict[str, Samples]:
        data = self.read()
        highest = max(int(part.labels.max()) for part in data.values())
        self.num_classes = highest + 1 if highest >= 0 else None
        if self.per_class is not None or self.imbalance != 1:
            how = (self.per_class, self.imbalance, self.subset_seed)
            data["train"] = data["train"].take(little_data(data["train"].labels, *how))
            self.training_images = describe_little(data["train"].labels, *how)
        splits: dict[str, Samples] = {"train": self._samples(self._share(data["train"]), training=True)}
        splits["bank"] = self._samples(self._choose(data.get("bank", data["train"]), self.bank_size, "bank"))
        if "val" in data:
            splits["val"] = self._samples(self._choose(data["val"], self.max_val_samples, "val"), held_out=True)
        self.tests_on_val = "test" not in data and "val" in data
        if "test" in data or self.tests_on_val:
            splits["test"] = self._samples(data["val" if self.tests_on_val else "test"], held_out=True)
        if self.on_bad_sample == "raise":
            for part in data.values():
                part.images[0]  # an unreadable set should stop here, not in a worker
        return splits

    def _share(self, train: LabelledImages) -> LabelledImages:
        """What `train_fraction` leaves of the training images."""
        if self.train_fraction == 1:
            return train
        of = self.training_images or f"all, subset seed {self.subset_seed}"
        self.training_images = f"{self.train_fraction:g} of {of}"
        return train.take(share(train.labels, self.train_fraction, self.subset_seed))

    def _samples(self, data: LabelledImages, training: bool = False, held_out: bool = False) -> ImageSamples:
        if training:
            transforms = self.transform.build(self.image_size)
        else:
            transforms = [plain_view(self.image_size, self.crop_ratio)]
        if held_out and self.corruptions:
            transforms = [Corrupted(view, self.corruptions, self.severity) for view in transforms]
        return ImageSamples(data, transforms, training, self.mean, self.std, self.seed if training else EVAL_SEED)

    def _choose(self, data: LabelledImages, limit: int | None, name: str) -> LabelledImages:
        """At most `limit` images, the same ones whatever the seed of the run."""
        if limit is None or limit >= len(data.labels):
            return data
        generator = torch.Generator().manual_seed(named_seed(0, name))
        return data.take(torch.randperm(len(data.labels), generator=generator)[:limit].sort().values)

    def predict_on(self, images: LabelledImages) -> None:
        """Have `predict` see these images instead of the test split; the module's own data are then not read for it."""
        self.images_to_predict = images

    def setup(self, stage: str | None = None) -> None:
        if stage != "predict" or self.images_to_predict is None:
            super().setup(stage)
        elif "predict" not in self.splits:
            self.splits["predict"] = self._samples(self.images_to_predict)
            self.splits["predict"].on_bad_sample = self.on_bad_sample

    def predict_dataloader(self) -> Loader:
        return self.eval_loader(self._predicted)

    def file_names(self) -> list[str] | None:
        """The files of the images that `predict` sees, by id; None where images are not files of their own."""
        samples = self.splits[self._predicted]
        assert isinstance(samples, ImageSamples)
        return samples.images.files() if hasattr(samples.images, "files") else None

    @property
    def _predicted(self) -> str:
        return "test" if self.images_to_predict is None else "predict"

    def val_dataloader(self) -> list[Loader]:
        """[bank, query], or no loader where there is no validation split."""
        return self._with_bank("val") if "val" in self.splits else []

    def test_dataloader(self) -> list[Loader]:
        """[bank, test images], which are all validation images where the source has none of its own."""
        if self.tests_on_val:
            rank_zero_info(TESTS_ON_VAL)
        return self._with_bank("test")

    def _with_bank(self, split: str) -> list[Loader]:
        """[bank, split], or [split] for a task that compares with nothing and says so (`uses_bank` False)."""
        task = getattr(self.trainer, "lightning_module", None)
        bank = [self.eval_loader("bank")] if getattr(task, "uses_bank", True) else []
        return [*bank, self.eval_loader(split)]

    def describe(self) -> dict[str, str | int]:
        chosen = {"training_images": self.training_images} if self.training_images else {}
        held_out = {"corruption": f"{self.corruption}, severity {self.severity}"} if self.corruption else {}
        judged = {"test_images": TESTS_ON_VAL} if self.tests_on_val else {}
        return {
            **super().describe(),
            **chosen,
            **judged,
            **held_out,
            "bank_samples": self._size("bank"),
            "image_size": self.image_size,
            "channels": self.channels,
            "classes": self.num_classes or 0,
        }
