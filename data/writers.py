"""Images or text as WebDataset shards, split and shuffled, ready for ImageShards and TextShards.

Shards are written into a folder with a temporary name, which gets its own name when everything is there; so a folder
that exists is complete. Training samples are shuffled once on writing, because shards are read in blocks of neighbours.
Time stamps are zero: the same input gives the same bytes.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.io import encode_png

from data.documents import Document, read_corpus, split_documents
from data.image_base import LabelledImages
from data.image_sources import FileImages
from data.images import Images
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
    return _write(out, splits, samples_per_shard)


def write_text_shards(
    source: str | list[str],
    out: str,
    samples_per_shard: int = 1000,
    val_fraction: float = 0.05,
    test_fraction: float = 0.05,
    split_seed: int = 0,
) -> dict[str, list[Path]]:
    """Write a source of `data.TextFiles` as shards of documents; arguments and errors as in `write_image_shards`."""
    parts = split_documents(read_corpus(source).documents, val_fraction, test_fraction)
    splits = {split: _texts(documents, split, split_seed) for split, documents in parts.items() if documents}
    return _write(out, splits, samples_per_shard)


def _order(size: int, split: str, seed: int) -> list[int]:
    """Shuffled for training, as it came otherwise."""
    if split != "train":
        return list(range(size))
    generator = torch.Generator().manual_seed(named_seed(seed, "order of shards"))
    return torch.randperm(size, generator=generator).tolist()


def _texts(documents: list[Document], split: str, seed: int) -> Iterator[Sample]:
    for i in _order(len(documents), split, seed):
        yield {"txt": documents[i].content}


def _encoded(part: LabelledImages, split: str, resize: Transform | None, seed: int) -> Iterator[Sample]:
    """Files as they are where they need not be resized, PNG otherwise."""
    for i in _order(len(part.labels), split, seed):
        if isinstance(part.images, FileImages) and resize is None:
            path = Path(part.images.paths[i])
            sample = {path.suffix[1:].lower(): path.read_bytes()}
        else:
            image = part.images[i]
            sample = {"png": encode_png(image if resize is None else resize(image)).numpy().tobytes()}
        label = int(part.labels[i])
        yield {**sample, "cls": str(label).encode()} if label >= 0 else sample


def _write(out: str, splits: Mapping[str, Iterable[Sample]], samples_per_shard: int) -> dict[str, list[Path]]:
    """Write `<split>-<number>.tar` files into a new folder."""
    from webdataset import ShardWriter

    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard} but must be at least 1")
    with new_folder(out) as folder:
        for split, samples in splits.items():
            pattern = str(folder / split).replace("%", "%%") + "-%06d.tar"
            with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, encoder=False, mtime=0) as writer:
                for number, sample in enumerate(samples):
                    writer.write({"__key__": f"{split}-{number:08d}", **sample})
    return {split: sorted(Path(out).glob(f"{split}-*.tar")) for split in splits}


@contextmanager
def new_folder(out: str) -> Iterator[Path]:
    """A temporary folder that becomes `out` if all goes well and vanishes otherwise."""
    target = Path(out).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: choose another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def _umask() -> int:
    """The permissions that new folders lack; mkdtemp ignores it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
