"""Fixtures of the data tests: a stand-in for a process of a distributed run, and small image folders."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import write_jpeg, write_png

from data.token_writer import train_tokenizer
from tests.data.texts import TEXT


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def as_rank():
    """Make a data module believe that it belongs to one process of several; `done` batches have been processed."""

    def attach(module, rank: int = 0, world_size: int = 1, done: int = 0, limit: int | float = 1.0):
        progress = SimpleNamespace(total=SimpleNamespace(processed=done))
        module.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": world_size},
            accelerator=None,
            limit_train_batches=limit,
            overfit_batches=0,
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        )
        return module

    return attach


def picture(number: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def write_pictures(folder: Path, count: int, height: int = 20, width: int = 24) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        pixels = picture(number, height + number % 3, width)
        if number % 2:
            write_jpeg(pixels, str(folder / f"{number}.JPG"))
        else:
            write_png(pixels, str(folder / f"{number}.png"))


@pytest.fixture
def class_folder(tmp_path) -> Path:
    """Two classes of 20 images of several sizes."""
    for name in ("cat", "dog"):
        write_pictures(tmp_path / "pictures" / name, 20)
    return tmp_path / "pictures"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    """The file of a byte-level BPE of 400 tokens."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text(TEXT * 50 + "".join(f"word{n} " for n in range(300)))
    path = folder / "tokenizer.json"
    train_tokenizer([str(folder / "a.txt")], str(path), 400)
    return str(path)
