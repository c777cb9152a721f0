"""Counts what went wrong with the data, by file: samples that another one took the place of, and slow reads.

The batches bring it (data/base.py, key "faults"), from worker processes too. The counts travel in the checkpoint, so
that a resumed run goes on counting where its steps go on, with any number of processes.
"""

import csv
import io
import logging
from collections import Counter
from typing import Any

import lightning as L
import torch.distributed as dist

from .common import run_folder
from .files import write_atomically

log = logging.getLogger(__name__)
FILE = "bad_samples.csv"
LISTED = 3  # files that the line at the end names
Fault = tuple[str, str]  # kind ("bad", "slow") and file


class DataFaults(L.Callback):
    """Writes <run_dir>/bad_samples.csv (file, bad, slow) while fitting, where there is any, and a line at the end."""

    def __init__(self) -> None:
        self._counts: Counter[Fault] = Counter()  # of this process since the start
        self._before: Counter[Fault] = Counter()  # of all processes until the checkpoint, and while data were set up

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self._before:  # every process has read the same while it set up
            self._before.update(getattr(trainer.datamodule, "faults", ()))  # type: ignore[attr-defined]

    def _count(self, batch: Any) -> None:
        if isinstance(batch, dict):
            for part in (batch, *(value for value in batch.values() if isinstance(value, dict))):
                self._counts.update((kind, file) for kind, file in part.get("faults", ()))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._count(batch)

    def on_validation_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._count(batch)

    def on_test_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._count(batch)

    def on_predict_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self._count(batch)

    def state_dict(self) -> dict[str, Any]:
        """The counts of all processes; to be called on all of them, as a checkpoint is."""
        return {"counts": [[kind, file, count] for (kind, file), count in sorted(self._total().items())]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = Counter({(kind, file): count for kind, file, count in state_dict["counts"]})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._say(trainer)
        elif not trainer.sanity_checking:
            self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)
        self._say(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._say(trainer)

    on_predict_end = on_test_end

    def _write(self, trainer: L.Trainer) -> None:
        total, folder = self._total(), run_folder(trainer)
        if not total or folder is None or not trainer.is_global_zero:
            return
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("file", "bad", "slow"))
        for file in sorted({file for _, file in total}):
            table.writerow((file.encode(errors="backslashreplace").decode(), total["bad", file], total["slow", file]))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / FILE, text.getvalue())

    def _say(self, trainer: L.Trainer) -> None:
        total = self._total()
        if not trainer.is_global_zero:
            return
        for kind, what in (("bad", "samples that could not be read"), ("slow", "slow reads")):
            files = Counter({file: count for (known, file), count in total.items() if known == kind})
            if files:
                most = ", ".join(f"{file!r} {count}" for file, count in files.most_common(LISTED))
                log.warning("%d %s, in %d files: %s", files.total(), what, len(files), most)

    def _total(self) -> Counter[Fault]:
        """Counts of all processes."""
        parts: list[Counter[Fault]] = [self._counts]
        if dist.is_available() and dist.is_initialized():
            parts = [Counter()] * dist.get_world_size()
            dist.all_gather_object(parts, self._counts)
        return sum(parts, self._before.copy())
