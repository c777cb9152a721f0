"""What `moa predict` leaves behind: a table with a row a sample: its id, its path and what the task says about it.

NumPy's .npz holds one array a column and reads without pickle; .parquet (pyarrow, an extra) has features as lists of
fixed size, as vector databases and data frames take them.
"""

import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from ..checkpoints import PARTIAL
from ..errors import UserError

FORMATS = (".npz", ".parquet")
DEFAULT = "predictions.npz"


class PredictionFile(L.Callback):
    """Collects the tensors that `predict_step` returns, (B, ...) by name with an `id` (B,); writes them sorted by id.

    Padding (id -1) is left out. Where the data module knows the files of its samples, they are the column `path`. Each
    process of several writes its own samples, to <name>-<rank>.

    Args:
        path: the file, .npz or .parquet.

    Raises:
        UserError: another ending, or .parquet without pyarrow.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in FORMATS:
            raise UserError(f"--out is '{path}'; give a name that ends in {' or '.join(FORMATS)}")
        if path.suffix == ".parquet":
            try:
                import pyarrow.parquet  # noqa: F401 - asked before anything is computed
            except ImportError as error:
                raise UserError(
                    f"--out '{path}' needs pyarrow, which is not installed; install it, or name a .npz"
                ) from error
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._parts: dict[str, list[Tensor]] = {}

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        counted = outputs["id"].cpu() >= 0
        for name, values in outputs.items():
            values = values.detach().cpu()[counted]
            self._parts.setdefault(name, []).append(values.float() if values.dtype == torch.bfloat16 else values)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        columns = {name: torch.cat(parts).numpy() for name, parts in self._parts.items()}
        order = np.argsort(columns["id"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        file_names = getattr(trainer.datamodule, "file_names", lambda: None)()  # type: ignore[attr-defined]
        if file_names is not None:
            columns["path"] = np.array([file_names[i] for i in columns["id"]], dtype=np.str_)
        if trainer.world_size > 1:
            self.path = self.path.with_stem(f"{self.path.stem}-{trainer.global_rank}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_table(self.path, columns)
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written ({error}); choose another --out") from error
        self.shapes = {name: values.shape for name, values in columns.items()}


def write_table(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns of equal length, (n,) or (n, D), as the ending of the path says; the file is there when it is
    whole."""
    partial = path.with_name(f"{path.stem}{PARTIAL}{path.suffix}")  # NumPy insists on the ending
    try:
        _write(partial, columns)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, columns: dict[str, np.ndarray]) -> None:
    if path.suffix == ".npz":
        np.savez(path, allow_pickle=False, **columns)
        return
    import pyarrow
    import pyarrow.parquet

    arrays = {
        name: pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])
        if values.ndim == 2
        else pyarrow.array(values)
        for name, values in columns.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
