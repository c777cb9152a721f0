"""Batches are ready when a GPU asks: pinned memory, and workers that read ahead."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator

from data import TextFiles


@pytest.mark.parametrize(("accelerator", "pinned"), [(CUDAAccelerator, True), (CPUAccelerator, False)])
def test_batches_are_pinned_for_a_gpu_and_only_there(accelerator: type[Accelerator], pinned: bool, tmp_path) -> None:
    module = text(tmp_path)
    module.trainer = SimpleNamespace(accelerator=accelerator(), distributed_sampler_kwargs=None)  # type: ignore[assignment]
    assert [loader.pin_memory for loader in (module.train_dataloader(), module.val_dataloader())] == [pinned, pinned]


def test_workers_read_ahead(tmp_path: Path) -> None:
    loader = text(tmp_path, num_workers=1).train_dataloader()
    assert loader.prefetch_factor == 2
    assert loader.persistent_workers


def text(folder: Path, num_workers: int = 0) -> TextFiles:
    (folder / "words.txt").write_text("the quick brown fox jumps over a lazy dog\n" * 50)
    module = TextFiles(str(folder / "words.txt"), context_length=16, batch_size=4, num_workers=num_workers, seed=0)
    module.setup()
    return module
