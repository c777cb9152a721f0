"""What the tasks that train on labels share."""

from typing import Any

from lightning import LightningModule
from torch import Tensor

from moa_lightning.errors import UserError

NAMES = {"val": "validation", "test": "test"}


def check_labelled(task: LightningModule, what: str) -> None:
    """Raise UserError where a training sample has no label, or where a fit would validate on samples that all have
    none.

    Args:
        task: under way, so that its data are known.
        what: the samples in words.
    """
    missing = _unlabelled(task, "train")
    if missing is not None and bool(missing.any()):
        count, first = int(missing.sum()), int(missing.nonzero()[0])
        raise UserError(
            f"{type(task).__name__} trains on labels, and {count} training {what}s have none, the first of them {what} "
            f"{first}: give labelled data"
        )
    if task.trainer.limit_val_batches:
        check_judged(task, "val", what)


def check_judged(task: LightningModule, split: str, what: str) -> None:
    """Raise UserError where a split to be evaluated, "val" or "test", has samples and none of them has a label.

    Args:
        task: under way, so that its data are known.
        what: the samples in words.
    """
    missing = _unlabelled(task, split)
    if missing is not None and bool(missing.all()):
        raise UserError(
            f"{type(task).__name__} is judged by labels, and none of the {len(missing)} {NAMES[split]} {what}s has "
            "one: give labelled data"
        )


def _unlabelled(task: LightningModule, split: str) -> Tensor | None:
    """Which samples of a split have no label, a negative class or NaN for a number: bool (n,); None where there is no
    such split."""
    splits: dict[str, Any] = getattr(task.trainer.datamodule, "splits", {})  # type: ignore[attr-defined]
    labels: Tensor | None = getattr(splits.get(split), "labels", None)
    if labels is None:
        return None
    return labels.isnan() if labels.is_floating_point() else labels < 0
