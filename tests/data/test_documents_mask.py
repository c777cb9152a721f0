"""Which document each token of a window belongs to, for every source of text that knows; the others say that they
do not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data import Mixture, TextFiles, TextShards, TokenFiles
from data.text import TextModule
from data.token_writer import write_tokens
from moa_lightning.errors import UserError
from tests.data.test_shards import write_tar

CONTEXT = 24
NAMES = [f"{number:03d}.txt" for number in range(120)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """120 documents of 0 to 59 bytes, none with a NUL, which then stands after each document and nowhere else."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lengths = np.random.default_rng(0).integers(0, 60, len(NAMES))
    for name, length in zip(NAMES, lengths, strict=True):
        (folder / name).write_bytes((name.encode() * 10)[:length])
    return folder


@pytest.fixture
def shards(texts: Path, tmp_path: Path) -> Path:
    write_tar(tmp_path / "a.tar", [(name, (texts / name).read_bytes()) for name in NAMES])
    return tmp_path / "a.tar"


@pytest.fixture
def tokens(texts: Path, tmp_path: Path) -> Path:
    write_tokens([str(texts)], str(tmp_path / "tokens"), val_fraction=0.2)
    return tmp_path / "tokens"


def modules(texts: Path, shards: Path, tokens: Path) -> dict[str, TextModule]:
    options = {"context_length": CONTEXT, "batch_size": 4, "seed": 0, "mask_documents": True}
    found: dict[str, TextModule] = {
        "files": TextFiles(str(texts), val_fraction=0.2, test_fraction=0.2, **options),
        "shards": TextShards(str(shards), str(shards), **options),
        "tokens": TokenFiles(str(tokens), **options),
        "mixture": Mixture({"a": TokenFiles(str(tokens)), "b": TextFiles(str(texts))}, **options),
    }
    for module in found.values():
        module.setup()
    return found


def test_a_new_document_begins_after_every_separator(texts: Path, shards: Path, tokens: Path) -> None:
    for name, module in modules(texts, shards, tokens).items():
        for split in ("train", "val"):
            several = 0
            for index in range(len(module.splits[split])):
                sample = module.splits[split][(1, index)]
                ends = (sample["tokens"] == 0) & (sample["targets"] != -100)  # zeros fill up the last window
                expected = torch.cat([torch.zeros(1, dtype=torch.int64), ends.cumsum(0)[:-1]])
                counted = sample["targets"] != -100
                assert torch.equal(sample["documents"].long()[counted], expected[counted]), (name, split, index)
                assert sample["documents"].dtype == torch.int32
                several += int(expected[-1] > 0)
            assert several > 1, (name, split)
    assert next(iter(module.train_dataloader()))["documents"].shape == (4, CONTEXT)


def test_without_the_switch_there_is_nothing_to_see(tokens: Path) -> None:
    module = TokenFiles(str(tokens), context_length=CONTEXT, batch_size=4)
    module.setup()
    assert "documents" not in module.splits["train"][(0, 0)]


def test_token_files_of_others_do_not_say_where_documents_begin(tokens: Path) -> None:
    starts = tokens / "train.starts"
    content = starts.read_bytes()

    def setup(**options: bool) -> None:
        TokenFiles(str(tokens), context_length=CONTEXT, batch_size=4, **options).setup()

    for damaged in (content[:-3], content[8:16] + content[:8], content + (10**9).to_bytes(8, "little")):
        starts.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train\.starts' does not fit"):
            setup(mask_documents=True)
    starts.unlink()
    with pytest.raises(UserError, match=r"mask_documents .*train\.starts.* moa data tokens"):
        setup(mask_documents=True)
    setup()
