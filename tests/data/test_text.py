"""Text: corpus, splits, windows and their ids."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data import TextFiles
from data.documents import Document, file_documents, split_documents, split_names, stdlib_documents
from data.text import EvalWindows, JoinedBytes, TrainWindows
from moa_lightning.errors import UserError

TEXT = bytes(range(1, 251)) * 5  # 1250 bytes; a byte tells its place modulo 250


@pytest.fixture(scope="module")
def library():
    module = TextFiles(context_length=64, batch_size=8, max_val_samples=10)
    module.setup()
    return module


def test_stdlib_is_split_by_file_and_described(library):
    description = library.describe()
    names = [document.name for document in stdlib_documents()]
    assert "argparse.py" in names
    assert names == sorted(names)
    assert not [name for name in names if "site-packages" in name or "/test" in name or name.startswith("test")]
    total = sum(description[f"{split}_bytes"] for split in ("train", "val", "test"))
    assert 5e6 < total < 1e8
    assert 0.02 < description["val_bytes"] / total < 0.12
    assert len(description["sha256"]) == 64
    assert description["val_samples"] == library.val_samples == 10
    again = TextFiles(context_length=32, batch_size=8, seed=7)
    again.setup()
    assert again.describe()["sha256"] == description["sha256"]  # the corpus depends on the interpreter alone


def test_stdlib_splits_share_no_file():
    parts = split_documents(stdlib_documents(), 0.05, 0.05)
    names = {split: {document.name for document in part} for split, part in parts.items()}
    assert not names["train"] & names["val"]
    assert not names["train"] & names["test"]
    assert not names["val"] & names["test"]


def test_batch_has_the_agreed_format(library):
    batch = next(iter(library.train_dataloader()))
    assert set(batch) == {"tokens", "targets", "id", "seed"}
    assert batch["tokens"].shape == batch["targets"].shape == (8, 64)
    assert {value.dtype for value in batch.values()} == {torch.int64}
    assert torch.equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    assert library.vocab_size == len(library.token_bytes) == 256


def test_bytes_round_trip(library):
    text = "def f():\n    return 'ÄÖ€'"
    assert library.decode(library.encode(text)) == text
    assert library.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_training_windows_tile_the_text_without_overlap():
    windows = TrainWindows(JoinedBytes([TEXT]), 100, seed=0)
    offsets = [windows.offset(epoch) for epoch in range(20)]
    assert all(0 <= offset < 100 for offset in offsets)
    assert len(set(offsets)) > 10
    for epoch, offset in enumerate(offsets):
        seen = torch.cat([windows[(epoch, index)]["tokens"] for index in range(len(windows))]).tolist()
        assert bytes(seen) == TEXT[offset : offset + len(seen)]
        last = windows[(epoch, len(windows) - 1)]
        assert last["targets"][-1] == TEXT[offset + len(seen)]


@pytest.mark.parametrize("length", [101, 150, 200, 201, 1250])
def test_the_shortest_texts_still_train(length):
    windows = TrainWindows(JoinedBytes([TEXT[:length]]), 100, seed=0)
    for epoch in range(10):
        for index in range(len(windows)):
            assert len(windows[(epoch, index)]["targets"]) == 100


@pytest.mark.parametrize("length", [2, 100, 101, 102, 1250])
def test_evaluation_predicts_every_byte_after_the_first_once(length):
    windows = EvalWindows(JoinedBytes([TEXT[:length]]), 100, seed=0)
    targets = torch.cat([windows[(0, index)]["targets"] for index in range(len(windows))])
    assert bytes(targets[targets >= 0].tolist()) == TEXT[1:length]


def test_limited_validation_is_evenly_spaced():
    windows = EvalWindows(JoinedBytes([TEXT]), 100, seed=0, limit=4)
    first = [int(windows[(0, index)]["tokens"][0]) for index in range(len(windows))]
    assert first == [TEXT[i] for i in (0, 300, 600, 900)]  # 13 windows: numbers 0, 3, 6, 9


def test_validation_and_test_have_limits_of_their_own(tmp_path):
    (tmp_path / "book.txt").write_bytes(TEXT * 8)
    module = TextFiles(
        str(tmp_path / "book.txt"), 0.2, 0.3, context_length=10, batch_size=4, max_val_samples=5, max_test_samples=7
    )
    module.setup()
    assert (len(module.splits["val"]), len(module.splits["test"])) == (5, 7)
    with pytest.raises(UserError, match="max_test_samples is 0"):
        TextFiles(max_test_samples=0)


def test_padding_is_marked_and_not_counted():
    sample = EvalWindows(JoinedBytes([TEXT]), 100, seed=0)[(0, ~2)]
    assert sample["id"] == -1
    assert (sample["targets"] == -100).all()
    assert sample["tokens"].tolist() == list(TEXT[200:300])


def test_a_single_file_is_split_by_position(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(TEXT * 8)
    module = TextFiles(str(path), context_length=100, batch_size=4)
    module.setup()
    sizes = [module.describe()[f"{split}_bytes"] for split in ("train", "val", "test")]
    assert sizes == [9000, 500, 500]
    assert module.splits["val"][(0, 0)]["tokens"].tolist() == list((TEXT * 8)[9000:9100])


def test_many_files_are_split_and_joined_by_nul(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_bytes(bytes([65 + number]) * 50)
    (tmp_path / ".hidden").write_bytes(b"z" * 1000)
    for source in (str(tmp_path), str(tmp_path / "*.txt"), [str(tmp_path / f"{n}.txt") for n in range(30)]):
        module = TextFiles(source, context_length=10, batch_size=4, val_fraction=0.2, test_fraction=0.2)
        module.setup()
        description = module.describe()
        assert sum(description[f"{split}_bytes"] for split in ("train", "val", "test")) == 30 * 50 + 27
        assert module.splits["train"].source.content.max() < 65 + 30  # nothing hidden
    content = module.splits["val"].source.content
    assert np.count_nonzero(content == 0) == len(content) // 50 - 1


def test_split_by_name_is_stable_when_files_come_and_go():
    names = [f"file {number}" for number in range(400)]
    before, after = split_names(names, 0.1, 0.1), split_names(names[:300], 0.1, 0.1)
    for split in before:
        assert set(after[split]) == {i for i in before[split] if i < 300}
    assert 20 < len(before["val"]) < 60


def test_a_file_keeps_its_split_when_another_folder_is_named_beside_its_own(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        for number in range(60):
            (tmp_path / folder / "deep" / f"{number}.txt").write_text(f"{folder} {number}")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    sources = ([one], [one, two], [f"{one}/deep/*"], [str(tmp_path)])
    before, *after = (split_documents(file_documents(source), 0.2, 0.2) for source in sources)
    for parts in after:
        for split, documents in before.items():
            texts = {document.content for document in parts[split]}
            assert {text for text in texts if text.startswith(b"one")} == {document.content for document in documents}


def test_three_files_give_each_split_one():
    parts = split_documents([Document(name, b"text", 0.5) for name in "abc"], 0.05, 0.05)
    assert [len(parts[split]) for split in ("train", "val", "test")] == [1, 1, 1]


def test_without_validation_there_is_no_loader(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    module = TextFiles(str(tmp_path), context_length=10, batch_size=4, val_fraction=0, test_fraction=0)
    module.setup()
    assert module.val_dataloader() == []
    with pytest.raises(UserError, match="no test split"):
        module.test_dataloader()


def test_bytes_that_are_no_utf8_are_text_too(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)) * 4)
    module = TextFiles(str(tmp_path), context_length=8, batch_size=4)
    module.setup()
    assert module.train_samples > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "nowhere/at/all"}, "'nowhere/at/all' does not exist"),
        ({"source": "no*match"}, "matches no file"),
        ({"source": []}, "no text files"),
        ({"source": "EMPTY"}, "holds no files"),
        ({"source": "BLANK"}, "every file in it is empty"),
        ({"source": "SHORT", "context_length": 200}, "context_length 200 needs at least 201"),
        ({"source": "SHORT", "batch_size": 64}, "batch_size is 64 but the training data has only"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "sum must stay below 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context_length": 0}, "context_length is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").touch()
    (tmp_path / "short.txt").write_bytes(b"x" * 150)
    places = {"EMPTY": str(tmp_path / "empty"), "BLANK": str(tmp_path / "blank"), "SHORT": str(tmp_path / "short.txt")}
    options = {"context_length": 16, **options}
    options["source"] = places.get(str(options.get("source")), options.get("source", "stdlib"))
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        TextFiles(**options).setup()


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(as_rank, tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT)
    with pytest.raises(UserError, match="does not divide among 3 devices"):
        as_rank(TextFiles(str(tmp_path), context_length=10, batch_size=8), 0, 3).setup("fit")


def test_sha256_is_of_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello" * 100)
    module = TextFiles(str(tmp_path), context_length=8, batch_size=4)
    module.setup()
    assert module.describe()["sha256"] == hashlib.sha256(b"a.txt\x00500\x00" + b"hello" * 100).hexdigest()


def test_importing_data_loads_no_optional_package():
    import subprocess

    heavy = "[name for name in ('mlxtend', 'pandas', 'sklearn', 'webdataset') if name in sys.modules]"
    command = f"import sys, data; sys.exit(str({heavy}) if {heavy} else 0)"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", ["", "**", "**/*.txt", "*/**/*.txt", "./**/a.txt"])
def test_links_in_circles_are_not_followed_and_no_file_is_read_twice(tmp_path: Path, source: str) -> None:
    inner = tmp_path / "inner"
    (inner / ".hidden").mkdir(parents=True)
    (inner / "a.txt").write_text("once")
    (inner / ".hidden" / "a.txt").write_text("not at all")
    for number in range(12):  # following them up to the system's 40 levels would end never
        (inner / f"loop{number}").symlink_to(tmp_path)
        (inner / f"again{number}.txt").symlink_to(inner / "a.txt")
    assert [document.content for document in file_documents(f"{tmp_path}/{source}")] == [b"once"]
    assert [d.content for d in file_documents(f"{tmp_path}/inner/.hidden/**/*.txt")] == [b"not at all"]
