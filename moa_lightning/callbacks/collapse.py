"""Says in words, while it happens, that a self-supervised net collapses: that it tells images no longer apart.

Figures of the training batch show it on logging steps: how much of the features' energy differs between images
(train/feature_spread), the feature rank (train/feature_rank, RankMe) and, with DINO, two entropies in units of the
uniform distribution's: that of the teacher's outputs (train/teacher_entropy), which is 1 where they say nothing, and
that of their mean over the batch (train/prototype_entropy), which is 0 where they say the same of every image.

The features of a sound MAE share a large vector: while it is young, as little as 0.05 % of their energy differs, in
many directions, in which it goes on to learn. So without a teacher a low spread is no finding by itself; the rank,
which then falls to 1 only where next to nothing differs, must say so too. Sound DINOs of small runs had a spread of
0.12 and more.

A diagnosis needs a finding on `PATIENCE` logging steps in a row: nets pass through such states early in a run. It is in
the progress bar and the log, as text in TensorBoard, and as train/collapsed (0 or 1). A process with one image of a
batch cannot compare any, and nothing is said there.
"""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from ..evaluation.rank import feature_rank, feature_spread
from .common import is_logging_step, log_scalars, tensorboard_step, tensorboard_writer

log = logging.getLogger(__name__)

PATIENCE = 3  # logging steps
LEAST_SPREAD = 0.01  # untrained nets with a class token have 0.04 to 0.2, collapsed ones below 0.01
LEAST_RANK = 1.5  # of images that are not all alike
LEAST_RANK_WITHOUT_TEACHER = 1.2  # 170 small sound MAEs had 1.48 or more; ruined by a learning rate of 0.3: 1.1
MOST_ENTROPY = 0.995  # of the teacher, in units of the uniform distribution's
LEAST_ENTROPY = 0.01  # of the mean of its outputs: 1.1 prototypes of 65,536 in use
SETTLED = 100  # optimiser steps, before which the centre, at first zero, leaves a sound teacher with one prototype
ENTROPIES = ("train/teacher_entropy", "train/prototype_entropy")


def diagnosis(figures: Mapping[str, float]) -> str:
    """What is wrong in a few words, "" where nothing is.

    Args:
        figures: train/feature_spread, train/feature_rank and, where there is a teacher, ENTROPIES.
    """
    spread, rank = figures["train/feature_spread"], figures["train/feature_rank"]
    distils = ENTROPIES[0] in figures
    least_rank = LEAST_RANK if distils else LEAST_RANK_WITHOUT_TEACHER
    if spread < LEAST_SPREAD and (distils or rank < least_rank):
        return f"collapsed: the features of all images are alike ({100 * spread:.2g} % of their energy differs)"
    if rank < least_rank:
        return f"collapsed: the features of all images lie on one line (feature rank {rank:.2f})"
    entropy = figures.get("train/teacher_entropy", 0.0)
    if entropy > MOST_ENTROPY:
        return f"collapsed: the teacher's outputs are uniform (entropy {100 * entropy:.1f} % of the largest)"
    if figures.get("train/prototype_entropy", 1.0) < LEAST_ENTROPY:
        return "collapsed: the teacher's outputs are the same prototype for all images"
    return ""


class Collapse(L.Callback):
    """Watches what a task leaves in `train_features` (B, D); does nothing for tasks without it.

    Attributes:
        words: the present diagnosis, "" while there is none.
    """

    def __init__(self) -> None:
        self.words = ""
        self._seen = 0  # logging steps in a row with a finding

    def state_dict(self) -> dict[str, Any]:
        return {"words": self.words, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.words, self._seen = state["words"], state["seen"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        features: Tensor | None = getattr(pl_module, "train_features", None)
        if features is None or len(features) < 2 or not is_logging_step(trainer):
            return
        figures = {
            "train/feature_spread": float(feature_spread(features)),
            "train/feature_rank": float(feature_rank(features)),
        }
        entropies = _entropies(trainer.callback_metrics)
        if trainer.global_step < SETTLED:
            entropies.pop("train/prototype_entropy", None)
        found = diagnosis(figures | entropies)
        self._seen = self._seen + 1 if found else 0
        before, self.words = self.words, found if self._seen >= PATIENCE else ""
        log_scalars(trainer, {**figures, "train/collapsed": float(bool(self.words))})
        if bool(before) != bool(self.words):
            self._say(trainer, self.words or "the net tells images apart again")

    def _say(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            log.warning("step %d: %s", trainer.global_step, text)
        writer = tensorboard_writer(trainer)
        if writer is not None:
            writer.add_text("train/collapse", text, tensorboard_step(trainer))


def _entropies(logged: Mapping[str, Tensor]) -> dict[str, float]:
    """What a self-distillation has logged; in a joint run with its domain behind the name."""
    names = {name: next((key for key in (name, f"{name}_vision") if key in logged), None) for name in ENTROPIES}
    return {name: float(logged[key]) for name, key in names.items() if key is not None}
