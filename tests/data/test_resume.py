"""A run that stops anywhere and goes on from its checkpoint sees the samples that an uninterrupted run sees."""

import contextlib

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from data import TextFiles

BATCHES = 5  # in an epoch


class Recorder(L.LightningModule):
    """Learns nothing; keeps (id, first token) of each training sample."""

    def __init__(self, fail_at: int = -1):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.fail_at = fail_at
        self.seen: list[list[tuple[int, int]]] = []

    def training_step(self, batch):
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append(list(zip(batch["id"].tolist(), batch["tokens"][:, 0].tolist(), strict=True)))
        return (self.weight**2).sum()

    def validation_step(self, batch):
        self.log("val/loss", float(len(batch["id"])), batch_size=len(batch["id"]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(
        bytes(torch.randint(1, 256, (10 * 4 * BATCHES + 25,), generator=torch.Generator().manual_seed(0)).tolist())
    )
    return str(path)


def fit(book, folder, steps, resume=None, workers=0, fail_at=-1, every=None, train_fraction=1.0, **options):
    module = TextFiles(
        book,
        context_length=10,
        batch_size=4,
        num_workers=workers,
        seed=3,
        val_fraction=0.05,
        test_fraction=0,
        train_fraction=train_fraction,
    )
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=every, save_top_k=-1)] if every else []
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    recorder = Recorder(fail_at)
    with contextlib.suppress(SystemExit):  # Lightning turns an interrupt into an exit
        trainer.fit(recorder, module, ckpt_path=resume)
    return trainer, recorder


def first_part(book, folder, stop, **options):
    trainer, recorder = fit(book, folder, stop, **options)
    path = str(folder / "stopped.ckpt")
    trainer.save_checkpoint(path)
    return path, recorder.seen


@pytest.fixture
def whole(book, tmp_path):
    seen = fit(book, tmp_path, 4 * BATCHES)[1].seen
    assert len(seen) == 4 * BATCHES
    assert len({tuple(batch) for batch in seen}) == len(seen)  # order and offsets differ between epochs
    return seen


@pytest.mark.parametrize("stop", [1, 3, BATCHES, BATCHES + 1, 2 * BATCHES, 2 * BATCHES + 4])
def test_resume_after_any_step(book, tmp_path, whole, stop):
    path, seen = first_part(book, tmp_path, stop)
    assert seen == whole[:stop]
    assert fit(book, tmp_path, 4 * BATCHES, path)[1].seen == whole[stop:]


@pytest.mark.parametrize("stop", [3, BATCHES, BATCHES + 2])
def test_resume_from_a_checkpoint_written_while_training(book, tmp_path, whole, stop):
    fit(book, tmp_path, stop, every=1)
    path = next(tmp_path.glob(f"*step={stop}.ckpt"))
    assert fit(book, tmp_path, 4 * BATCHES, str(path))[1].seen == whole[stop:]


def test_resume_with_workers_validation_and_accumulation(book, tmp_path, whole):
    options = {"accumulate_grad_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None, "workers": 2}
    path, seen = first_part(book, tmp_path, 4, **options)
    rest = fit(book, tmp_path, 8, path, **options)[1].seen
    assert seen + rest == whole[: len(seen) + len(rest)]
    assert len(rest) >= 6


def test_resume_twice(book, tmp_path, whole):
    path, seen = first_part(book, tmp_path, 3)
    path, more = first_part(book, tmp_path, BATCHES + 4, resume=path)
    rest = fit(book, tmp_path, 4 * BATCHES, path)[1].seen
    assert seen + more + rest == whole


def test_a_step_that_was_interrupted_is_done_again(book, tmp_path, whole):
    path, seen = first_part(book, tmp_path, 4 * BATCHES, fail_at=BATCHES + 2)
    assert seen == whole[: BATCHES + 2]
    assert fit(book, tmp_path, 2 * BATCHES, path)[1].seen == whole[BATCHES + 2 : 2 * BATCHES]


def test_limited_epochs_resume_too(book, tmp_path):
    seen = fit(book, tmp_path, 10, limit_train_batches=3)[1].seen
    path, first = first_part(book, tmp_path, 4, limit_train_batches=3)
    assert first + fit(book, tmp_path, 10, path, limit_train_batches=3)[1].seen == seen


def test_overfitting_repeats_the_same_batches(book, tmp_path):
    seen = fit(book, tmp_path, 6, overfit_batches=2)[1].seen
    assert seen == seen[:2] * 3


def test_resuming_gives_no_warning_about_the_loader(book, tmp_path, recwarn):
    path, _ = first_part(book, tmp_path, 3)
    fit(book, tmp_path, 5, path)
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_the_start_follows_the_batches_done_not_the_devices(as_rank, book, tmp_path, whole):
    """Seven batches on one device, then two devices."""
    shares = []
    for rank in (0, 1):
        module = as_rank(TextFiles(book, context_length=10, batch_size=4, seed=3, test_fraction=0), rank, 2, done=7)
        module.setup()
        shares.append([batch["id"].tolist() for batch in module.train_dataloader()])
    joined = [first + second for first, second in zip(*shares, strict=True)]
    assert joined == [[sample for sample, _ in batch] for batch in whole[7 : 2 * BATCHES]]
