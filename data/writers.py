"""Images or text as WebDataset shards, split and shuffled, ready for ImageShards and TextShards.

Where classes have names, they lie beside the shards as class_names.json, in the order of the numbers.

Shards are written into a folder with a temporary name, which gets its own name when everything is there; so a folder
that exists is complete. Training samples are shuffled once on writing, because shards are read in blocks of neighbours.
Time stamps are zero: the same input gives the same bytes.
"""

import errno
import json
import os
import shutil
import tarfile
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torchvision.io import encode_png

from data.documents import check_fractions, split_spans
from data.image_base import LabelledImages
from data.image_shards import CLASS_NAMES
from data.image_sources import FileImages
from data.images import Images
from data.sources import Bad, documents
from data.transforms import Transform, plain_view
from moa_lightning.errors import UserError
from moa_lightning.random import named_seed

Sample = dict[str, bytes]


def write_image_shards(
    source: str,
    out: str,
    samples_per_shard: int = 1000,
    image_size: int | None = None,
    root: str | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    split_seed: int = 0,
) -> dict[str, list[Path]]:
    """Write a source of `data.Images` as shards of images and class numbers.

    Args:
        source: as for `data.Images`.
        out: folder to write; it must not exist or be empty.
        samples_per_shard: images in a shard.
        image_size: resize the shorter side, crop the centre, store PNG; None keeps images as they are.
        root: folder of the local copy of a packaged set.
        val_fraction: share of the images for validation where the source has no such split.
        test_fraction: the same for testing, but of a folder with train/ and val/ nothing is split off.
        split_seed: of the split and of the order.

    Returns:
        The shards of each split.

    Raises:
        UserError: an unusable source or folder.
    """
    module = Images(source, root, val_fraction=val_fraction, test_fraction=test_fraction, split_seed=split_seed)
    resize = plain_view(image_size) if image_size else None
    splits = {split: _encoded(part, split, resize, split_seed) for split, part in module.read().items()}
    return _write(out, splits, samples_per_shard, module.class_names)


def write_text_shards(
    source: str | Sequence[str],
    out: str,
    samples_per_shard: int = 1000,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    split_seed: int = 0,
    text_field: str = "text",
    bad: Bad | None = None,
) -> dict[str, list[Path]]:
    """Write text as shards of documents, in memory that grows by some tens of bytes a document.

    All documents are first copied into one unnamed file beside the shards, which takes as much disk as they do, and
    are then taken out of it in the order of the shards.

    Args:
        source: "stdlib", or files, folders and globs, see `sources.documents`.
        out: folder to write; it must not exist or be empty.
        samples_per_shard: documents in a shard.
        val_fraction: share of the documents for validation, by a hash of their beginnings (names in the standard
            library); fewer than three documents are split by position, as in `data.TextFiles`.
        test_fraction: the same for testing.
        split_seed: of the order.
        text_field: key or column that holds the text.
        bad: told about documents that cannot be read; None: the first one ends it.

    Returns:
        The shards of each split.

    Raises:
        UserError: unusable sources or folder, or nothing in them.
    """
    check_fractions(val_fraction, test_fraction)
    _check_shards(samples_per_shard)
    sources = [source] if isinstance(source, str) else source
    with new_folder(out) as folder, tempfile.TemporaryFile(dir=folder) as copy:
        places, ends = array("d"), array("q", [0])
        for text in documents(sources, text_field, False, bad or Bad()):
            places.append(text.place)
            ends.append(ends[-1] + sum(copy.write(piece) for piece in text.pieces))
        if not places:
            raise UserError(f"text source {source!r} holds no text: every file in it is empty or bad")
        bounds = np.stack([np.asarray(ends, np.int64)[:-1], np.asarray(ends, np.int64)[1:]], 1)
        found = split_spans(places, bounds, val_fraction, test_fraction)
        parts = {split: spans for split, spans in found.items() if len(spans)}
        for split, spans in parts.items():
            _write_texts(folder, split, spans[_order(len(spans), split, split_seed)], copy, samples_per_shard)
    return {split: sorted(Path(out).glob(f"{split}-*.tar")) for split in parts}


def _write_texts(folder: Path, split: str, spans: np.ndarray, copy: IO[bytes], samples_per_shard: int) -> None:
    """Write these pieces of a file as documents, in this order, none of them held whole."""
    for shard, first in enumerate(range(0, len(spans), samples_per_shard)):
        with tarfile.open(folder / f"{split}-{shard:06d}.tar", "w") as tar:
            for number, (start, stop) in enumerate(spans[first : first + samples_per_shard].tolist(), first):
                member = tarfile.TarInfo(f"{split}-{number:08d}.txt")
                member.size = stop - start
                copy.seek(start)
                tar.addfile(member, copy)


def _order(size: int, split: str, seed: int) -> np.ndarray:
    """Shuffled for training, as it came otherwise: int64 (size,)."""
    if split != "train":
        return np.arange(size)
    generator = torch.Generator().manual_seed(named_seed(seed, "order of shards"))
    return torch.randperm(size, generator=generator).numpy()


def _encoded(part: LabelledImages, split: str, resize: Transform | None, seed: int) -> Iterator[Sample]:
    """Files as they are where they need not be resized, PNG otherwise."""
    for i in _order(len(part.labels), split, seed).tolist():
        if isinstance(part.images, FileImages) and resize is None:
            path = Path(part.images.paths[i])
            sample = {path.suffix[1:].lower(): path.read_bytes()}
        else:
            image = part.images[i]
            sample = {"png": encode_png(image if resize is None else resize(image)).numpy().tobytes()}
        label = int(part.labels[i])
        yield {**sample, "cls": str(label).encode()} if label >= 0 else sample


def _write(
    out: str, splits: Mapping[str, Iterable[Sample]], samples_per_shard: int, class_names: list[str] | None
) -> dict[str, list[Path]]:
    """Write `<split>-<number>.tar` files, and the names of classes where there are any, into a new folder."""
    from webdataset import ShardWriter

    _check_shards(samples_per_shard)
    with new_folder(out) as folder:
        for split, samples in splits.items():
            pattern = str(folder / split).replace("%", "%%") + "-%06d.tar"
            with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, encoder=False, mtime=0) as writer:
                for number, sample in enumerate(samples):
                    writer.write({"__key__": f"{split}-{number:08d}", **sample})
        if class_names is not None:
            (folder / CLASS_NAMES).write_text(json.dumps(class_names) + "\n")
    return {split: sorted(Path(out).glob(f"{split}-*.tar")) for split in splits}


def _check_shards(samples_per_shard: int) -> None:
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard} but must be at least 1")


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A temporary folder that becomes `out` if all goes well and vanishes otherwise."""
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another name or remove it")
    with writing(out):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise _unwritable(out, error) from error
        raise


@contextmanager
def writing(out: str) -> Iterator[None]:
    """UserError where the system does not let `out` be written."""
    try:
        yield
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: str, error: OSError) -> UserError:
    return UserError(f"--out {out} cannot be written ({error.strerror or error}): choose another place or make room")


def _umask() -> int:
    """The permissions that new folders lack; mkdtemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
