"""What the tasks that train on labels share."""

from typing import Any

from lightning import LightningModule

from moa_lightning.errors import UserError


def check_labelled(task: LightningModule, what: str) -> None:
    """Raise UserError where a training sample has no label: a negative class, or NaN for a number.

    Args:
        task: under way, so that its data are known.
        what: the samples in words.
    """
    splits: dict[str, Any] = getattr(task.trainer.datamodule, "splits", {})  # type: ignore[attr-defined]
    labels = getattr(splits.get("train"), "labels", None)
    if labels is None:
        return
    missing = labels.isnan() if labels.is_floating_point() else labels < 0
    if bool(missing.any()):
        count, first = int(missing.sum()), int(missing.nonzero()[0])
        raise UserError(
            f"{type(task).__name__} trains on labels, and {count} training {what}s have none, the first of them {what} "
            f"{first}: give labelled data"
        )
