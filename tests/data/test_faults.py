"""Faults in data: fatal with one sentence, or replaced alike on every world size, counted, and out of evaluation."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils.data._utils import signal_handling

from data import Images, ImageShards, TextFiles, TextShards
from data.base import SUBSTITUTES, DataModule
from moa_lightning.callbacks import DataFaults
from moa_lightning.errors import UserError
from moa_lightning.mistakes import mistakes, process_mistake
from tests.data.conftest import write_pictures
from tests.data.test_shards import png, write_tar


@pytest.fixture
def pictures(tmp_path):
    """48 images of one class for training and 21 for validation, of which 5 and 2 cannot be decoded."""
    write_pictures(tmp_path / "set/train/cat", 48)
    write_pictures(tmp_path / "set/val/cat", 21)
    bad = {f"train/cat/{number}.png" for number in (0, 8, 14, 36)} | {
        "train/cat/15.JPG",
        "val/cat/4.png",
        "val/cat/7.JPG",
    }
    for name in bad:
        path = tmp_path / "set" / name
        path.write_bytes(path.read_bytes()[:60])
    return tmp_path / "set", {str(tmp_path / "set" / name) for name in bad}


def images(folder, **options) -> Images:
    options = {"on_bad_sample": "skip", **options}
    return Images(str(folder), image_size=16, batch_size=12, seed=5, test_fraction=0.0, **options)


def read(loader) -> tuple[list[dict], Counter]:
    batches = list(loader)
    return batches, Counter(fault for batch in batches for fault in batch.get("faults", ()))


def test_a_bad_picture_is_fatal_by_default_and_named(pictures):
    folder, bad = pictures
    with pytest.raises(UserError, match=r"cannot be decoded") as caught:
        images(folder, on_bad_sample="raise").setup()  # the first picture is bad
    assert any(path in str(caught.value) for path in bad)


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_pictures_are_replaced_alike_for_every_world_size(pictures, as_rank, workers):
    folder, bad = pictures
    whole = as_rank(images(folder))
    whole.setup()
    expected, faults = read(whole.train_dataloader())
    assert len(expected) == 4
    assert {len(batch["id"]) for batch in expected} == {12}
    assert faults == {("bad", path): 1 for path in bad if "train" in path}
    paths = whole.splits["train"].images.paths
    seen = {paths[i] for batch in expected for i in batch["id"].tolist()}
    assert seen == set(paths) - bad
    shares = []
    for rank in range(3):
        module = as_rank(images(folder, num_workers=workers), rank, 3)
        module.setup()
        batches, found = read(module.train_dataloader())
        shares.append(batches)
        faults -= found
    assert not +faults
    for parts, batch in zip(zip(*shares, strict=True), expected, strict=True):
        assert torch.equal(torch.cat([part["views"][0] for part in parts]), batch["views"][0])
        assert torch.equal(torch.cat([part["id"] for part in parts]), batch["id"])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bad_pictures_are_not_counted_in_evaluation(pictures, as_rank, world_size):
    folder, bad = pictures
    ids, faults = [], Counter()
    for rank in range(world_size):
        module = as_rank(images(folder), rank, world_size)
        module.setup()
        batches, found = read(module.val_dataloader()[1])
        faults += found
        for batch in batches:
            hidden = batch["id"] < 0
            assert (batch["label"][hidden] == -1).all()
            assert (batch["label"][~hidden] == 0).all()
            ids += batch["id"][~hidden].tolist()
    val = module.splits["val"].images.paths
    assert sorted(ids) == [i for i, path in enumerate(val) if path not in bad]
    assert faults == {("bad", path): 1 for path in bad if "/val/" in path}


def test_when_nothing_can_be_read_there_is_an_end(pictures):
    folder, _ = pictures
    module = images(folder)
    module.setup()
    for path in folder.rglob("*.*"):
        path.write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=f"{SUBSTITUTES} samples in a row could not be read, and the last error was: .*cat"
    ):
        next(iter(module.train_dataloader()))


def test_a_picture_that_disappears_is_a_bad_sample(pictures):
    folder, _ = pictures
    module = images(folder)
    module.setup()
    (folder / "train/cat/1.JPG").unlink()
    _, faults = read(module.train_dataloader())
    assert faults["bad", str(folder / "train/cat/1.JPG")] == 1
    module.splits["train"].on_bad_sample = "raise"
    with pytest.raises(UserError, match=r"1\.JPG cannot be read \(No such file|cannot be decoded"):
        list(module.train_dataloader())


@pytest.fixture
def shards(tmp_path):
    paths = []
    for shard in range(3):
        members = [(f"{n:03d}.png", png(n)) for n in range(20 * shard, 20 * shard + 20)]
        paths.append(write_tar(tmp_path / f"part-{shard}.tar", members))
    return paths


def shard_module(shards, **options) -> ImageShards:
    module = ImageShards(shards, val=shards[0], image_size=16, batch_size=10, seed=1, shuffle_block=4, **options)
    module.setup()
    return module


def truncate(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def exchange(path: str) -> None:
    content = Path(path).read_bytes()
    os.unlink(path)
    Path(path).write_bytes(content)
    os.utime(path, ns=(7, 7))


@pytest.mark.parametrize(
    ("damage", "message", "workers"),
    [
        (os.unlink, r"sample number \d+ of shard .*part-1.tar cannot be read \(No such file", 0),
        (truncate, r"of shard .*part-1.tar is gone: the shard was changed after it was indexed", 0),
        (exchange, r"of shard .*part-1.tar is gone: the shard was changed after it was indexed", 1),
    ],
)
def test_a_shard_that_is_damaged_after_indexing(shards, damage, message, workers):
    skipping, fatal = (shard_module(shards, on_bad_sample=how, num_workers=workers) for how in ("skip", "raise"))
    damage(shards[1])
    batches, faults = read(skipping.train_dataloader())
    assert len(batches) == 6  # the steps stay
    assert faults == {("bad", shards[1]): 20}
    assert not any(20 <= i < 40 for batch in batches for i in batch["id"].tolist())
    with pytest.raises(UserError, match=message):
        list(fatal.train_dataloader())


def test_a_shard_that_is_cut_off_while_it_is_open(shards):
    module = shard_module(shards, on_bad_sample="skip")
    list(module.train_dataloader())  # opens all of them
    truncate(shards[1])
    _, faults = read(module.train_dataloader())
    assert set(faults) == {("bad", shards[1])}
    assert 8 <= faults["bad", shards[1]] <= 12
    module.splits["train"].on_bad_sample = "raise"
    with pytest.raises(UserError, match=r"part-1.tar is gone: the shard was cut off"):
        list(module.train_dataloader())


def test_a_shard_written_anew_is_not_read_through_an_old_handle(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"old text" * 40)])
    first = TextShards(path, val=path, context_length=16, batch_size=2)
    first.setup()
    list(first.train_dataloader())
    os.unlink(path)
    write_tar(tmp_path / "s.tar", [("a.txt", b"new text" * 50)])
    second = TextShards(path, val=path, context_length=16, batch_size=2)
    second.setup()
    assert second.splits["val"].source.read(0, 8).tobytes() == b"new text"


def test_a_slow_shard_is_counted_and_read(shards, monkeypatch):
    monkeypatch.setattr("data.faults.SLOW_SECONDS", 0.02)
    pread = os.pread

    def slow(descriptor, length, offset):
        if os.readlink(f"/proc/self/fd/{descriptor}") == shards[2]:
            time.sleep(0.03)
        return pread(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", slow)
    batches, faults = read(shard_module(shards).train_dataloader())
    assert faults["slow", shards[2]] == 20
    assert sorted(i for batch in batches for i in batch["id"].tolist()) == list(range(60))


LATIN = "na\xefve caf\xe9 ".encode("latin-1") * 40
GREEK = "μῆνιν ἄειδε θεὰ ".encode() * 40


def test_text_that_is_not_utf8_in_files(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_bytes(GREEK)
    (tmp_path / "bad.txt").write_bytes(LATIN)
    options = {"context_length": 16, "batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.0}
    with pytest.raises(UserError, match=r"text file 'bad\.txt' is not UTF-8 at byte 2"):
        TextFiles(str(tmp_path), encoding="utf-8", **options).setup()
    module = TextFiles(str(tmp_path), encoding="utf-8", on_bad_sample="skip", **options)
    module.setup()
    assert module.faults == [("bad", "bad.txt")]
    assert module.describe()["files"] == 6
    (tmp_path / "bad.txt").unlink()
    clean = TextFiles(str(tmp_path), **options)
    clean.setup()
    assert clean.describe()["sha256"] == module.describe()["sha256"]


def test_text_that_is_not_utf8_in_shards(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", GREEK), ("b.txt", LATIN), ("c.txt", GREEK)])
    module = TextShards(path, val=path, context_length=13, batch_size=3, encoding="utf-8", on_bad_sample="skip")
    module.setup()
    batches, faults = read(module.val_dataloader())
    touched = sum(  # windows and the token after them that hold a piece of b's text after its first bytes
        start < len(GREEK) + 1 + len(LATIN) and start + 14 > len(GREEK) + 1 for start in range(0, 3000, 13)
    )
    assert touched - 3 <= faults["bad", path] <= touched
    for batch in batches:
        assert (batch["targets"][batch["id"] < 0] == -100).all()
    counted = torch.cat([batch["targets"][batch["id"] >= 0].flatten() for batch in batches])
    assert 0xEF not in counted[len(GREEK) :].tolist()  # latin-1's "ï" is gone
    module.splits["val"].on_bad_sample = "raise"
    with pytest.raises(UserError, match=r"sample 'b' of shard .* is not UTF-8"):
        list(module.val_dataloader())


class Counted(L.LightningModule):
    """Learns nothing; a callback may end it."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch):
        return (self.weight**2).sum()

    def validation_step(self, batch, index, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: DataModule, folder, *callbacks: L.Callback, resume=None, **options) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(Counted(), module, ckpt_path=resume, weights_only=True)
    return trainer


def test_the_counts_reach_the_report_through_workers_and_resume(pictures, tmp_path, caplog):
    folder, bad = pictures
    trainer = fit(images(folder, num_workers=1), tmp_path / "first", DataFaults(), max_steps=3, limit_val_batches=0)
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    fit(
        images(folder),
        tmp_path / "rest",
        DataFaults(),
        resume=tmp_path / "three.ckpt",
        max_steps=8,
        limit_val_batches=0,
    )
    rows = (tmp_path / "rest/bad_samples.csv").read_text().splitlines()
    assert rows == ["file,bad,slow", *sorted(f"{path},2,0" for path in bad if "train" in path)]  # two epochs
    assert "10 samples that could not be read, in 5 files" in caplog.text


class Kill(L.Callback):
    """SIGKILL for a data worker at step 1."""

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 1:
            worker = trainer.train_dataloader._iterator._workers[0]
            os.kill(worker.pid, signal.SIGKILL)


def test_a_worker_that_dies_is_one_sentence_and_no_hang(pictures, tmp_path):
    started = time.monotonic()
    sentence = r"^a process that reads data died \((is killed by signal: Killed|exited unexpectedly)\)[^\n]*$"
    module = images(pictures[0], num_workers=1)
    with pytest.raises(UserError, match=sentence), mistakes([], []):
        fit(module, tmp_path, Kill(), max_epochs=50, limit_val_batches=0)
    assert time.monotonic() - started < 30


def test_a_worker_that_dies_in_a_second_fit_is_noticed_too(pictures, tmp_path, monkeypatch):
    """The first fit's Trainer leaves the process with the handlers that it found, and torch's was set after that."""
    monkeypatch.setattr("data.base.WORKER_SECONDS", 60.0)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        fit(images(pictures[0], num_workers=1), tmp_path, max_steps=2, limit_val_batches=0)
        started = time.monotonic()
        with pytest.raises(UserError, match="a process that reads data died"), mistakes([], []):
            fit(images(pictures[0], num_workers=1), tmp_path, Kill(), max_epochs=50, limit_val_batches=0)
        assert time.monotonic() - started < 60
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_worker_that_hangs_is_one_sentence(pictures, monkeypatch):
    monkeypatch.setattr("data.base.WORKER_SECONDS", 1.0)
    monkeypatch.setattr("data.image_base.decode_image", lambda *_: time.sleep(60))
    module = images(pictures[0], num_workers=1)
    module.setup()
    with pytest.raises(RuntimeError) as caught:
        list(module.train_dataloader())
    assert process_mistake(str(caught.value)) == "no batch came in 1 seconds: check that the disk with the data answers"


def test_an_unknown_choice_is_named():
    with pytest.raises(UserError, match="on_bad_sample is 'ignore'; choose from raise, skip"):
        Images(on_bad_sample="ignore")
    with pytest.raises(UserError, match="encoding is 'ascii'; choose from bytes, utf-8"):
        TextFiles(encoding="ascii")
