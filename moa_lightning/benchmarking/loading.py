"""Whether the data keep up: image and text shards through the data modules against the bare limit.

The limit is the least that any reader does: go through the tars in order and decode each sample once, in one process.
The data modules do more: they read in shuffled order, crop, and make batches. Each line adds one part to the line
before it, so that it shows which part bounds. The shards are written for the purpose: JPEGs of smooth noise, printable
text. A byte of text is a token.
"""

import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.io import encode_jpeg
from webdataset import ShardWriter

from data import ImageShards, TextShards
from data.base import DataModule, Samples
from data.image_base import decode

from .machine import Machine, Setting, Sizes
from .timing import Row, alternate, rows

SHARDS = 4
BATCH = 32
DOCUMENT = 20_000  # bytes
READ, LIMIT = "tar read, in order", "tar read + decode, in order"
SAMPLES, LOADER = "shuffled samples", "batches, read in the training process"
PARTS = {LIMIT: "decoding", SAMPLES: "order and views", LOADER: "making batches"}  # what a line adds


@dataclass(frozen=True)
class Source:
    """Shards, the least work on them, and the data module that reads them."""

    name: str
    paths: list[str]
    decode: Callable[[bytes], Any]
    module: Callable[[int], DataModule]
    """of a number of workers"""
    unit: str
    amount: float
    """units in an epoch"""


def data(setting: Setting, machine: Machine) -> list[Row]:
    """An epoch of image shards and one of text shards."""
    with TemporaryDirectory() as folder:
        sources = (image_shards(Path(folder), setting.sizes), text_shards(Path(folder), setting.sizes))
        return [row for source in sources for row in _measure(source, setting)]


def image_shards(folder: Path, sizes: Sizes) -> Source:
    """Shards of JPEGs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(256, (sizes.stored_images, 3, 16, 16), generator=generator).float()

    def jpeg(number: int) -> dict[str, bytes]:
        image = F.interpolate(coarse[number : number + 1], sizes.stored_pixels, mode="bicubic", antialias=True)
        return {"jpg": encode_jpeg(image[0].clamp(0, 255).to(torch.uint8), quality=90).numpy().tobytes()}

    paths = _write(folder / "images", sizes.stored_images, jpeg)

    def module(workers: int) -> DataModule:
        batch = min(BATCH, sizes.stored_images // 4)
        return ImageShards(paths, image_size=sizes.image, batch_size=batch, num_workers=workers, seed=0)

    count = float(sizes.stored_images)
    return Source("image shards", paths, lambda content: decode(content, 3, "", str), module, "images/s", count)


def text_shards(folder: Path, sizes: Sizes) -> Source:
    """Shards of documents of 20 kB."""
    generator = np.random.default_rng(0)

    def document(number: int) -> dict[str, bytes]:
        return {"txt": generator.integers(32, 127, DOCUMENT, dtype=np.uint8).tobytes()}

    documents = -(-sizes.text_bytes // DOCUMENT)
    paths = _write(folder / "text", documents, document)

    def module(workers: int) -> DataModule:
        return TextShards(paths, context_length=sizes.context, batch_size=BATCH, num_workers=workers, seed=0)

    def tokens(content: bytes) -> np.ndarray:
        return np.frombuffer(content, dtype=np.uint8).astype(np.int64)

    return Source("text shards", paths, tokens, module, "tokens/s", float(documents * DOCUMENT))


def _write(folder: Path, count: int, sample: Callable[[int], dict[str, bytes]]) -> list[str]:
    folder.mkdir()
    pattern = str(folder).replace("%", "%%") + "/%03d.tar"
    with ShardWriter(pattern, maxcount=-(-count // SHARDS), verbose=0, encoder=False, mtime=0) as writer:
        for number in range(count):
            writer.write({"__key__": f"{number:06d}", **sample(number)})
    return sorted(map(str, folder.glob("*.tar")))


def _measure(source: Source, setting: Setting) -> list[Row]:
    modules = {workers: source.module(workers) for workers in (0, max(1, os.cpu_count() or 1))}
    for module in modules.values():
        module.setup("fit")
    loaders = {workers: module.train_dataloader() for workers, module in modules.items()}
    keys = [key for batch in loaders[0].batch_sampler for key in batch]
    samples: Samples = modules[0].splits["train"]
    calls: dict[str, Callable[[], Any]] = {
        READ: lambda: _exhaust(members(source.paths)),
        LIMIT: lambda: _exhaust(source.decode(content) for content in members(source.paths)),
        SAMPLES: lambda: _exhaust(samples[key] for key in keys),
        **{_loader_name(workers): partial(_exhaust, loader) for workers, loader in loaders.items()},
    }
    seconds = alternate(calls, setting.effort, setting.device)
    baselines = {name: LIMIT for name in calls if name != LIMIT}
    measured = rows(f"{source.name}, an epoch", seconds, baselines)
    for row in measured:
        row.figures[source.unit] = source.amount / row.ms * 1e3
    _name_bound(measured, max(modules))
    return measured


def _loader_name(workers: int) -> str:
    return LOADER if workers == 0 else f"batches, {workers} worker processes"


def members(paths: list[str]) -> Iterator[bytes]:
    """The members of tars, one after the other."""
    for path in paths:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None  # the shards hold regular files only
                yield content.read()


def _exhaust(values: Any) -> None:
    for _ in values:
        pass


def _name_bound(measured: list[Row], workers: int) -> None:
    """Note which part takes most of the time of the reader in the training process, and whether handing batches over is
    what the workers mostly do."""
    took = {row.variant: row.ms for row in measured}
    order = (READ, LIMIT, SAMPLES, LOADER)
    shares = {"reading": took[READ]}
    shares |= {PARTS[after]: took[after] - took[before] for before, after in pairwise(order)}
    bound = max(shares, key=lambda part: shares[part])
    by_name = {row.variant: row for row in measured}
    by_name[LOADER].note = f"bound by {bound}, {max(0.0, shares[bound]) / took[LOADER]:.0%} of its time"
    shared = measured[-1]
    passing = took[shared.variant] - took[LOADER] / workers
    if passing > shared.ms / 2:
        shared.note = f"bound by passing batches between processes, {passing / shared.ms:.0%} of its time"
