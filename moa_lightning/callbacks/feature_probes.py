"""Evaluation of a vision net by the field's offline protocols: k-NN for several k, and a linear probe whose
learning rate is swept, both on features of the plain view of every bank and query image, beside the same figures for
raw pixels.

It works in `moa test` and `moa validate`, and in a fit in the validation after the last step. The bank is of training
images (data.bank_size of them; the official protocols take all), and every choice is made on a part of it: test images
are looked at once. Every process gathers all features and works out the same figures.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..errors import UserError
from ..evaluation.knn import knn_accuracies
from ..evaluation.linear_sweep import RATES, LinearAccuracy, linear_accuracy
from ..evaluation.rank import feature_rank

log = logging.getLogger(__name__)

MOST_PIXELS = 4096  # values of an image: where raw pixels are a baseline that anybody would use
BANK, QUERY = 0, 1
WIDTH = 120  # columns of the table, also where the output is a file


class Figures(NamedTuple):
    """What features are worth."""

    neighbours: dict[int, float]  # k -> percent
    linear: LinearAccuracy | None  # None where there are too few images
    rank: float  # of the queries


class LabelledFeatures(Metric):
    """Features (n, D) and labels (n,) that come in batches, put together over all processes."""

    features: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("features", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Samples with label -1 are left out."""
        self.features.append(features[labels >= 0].float())
        self.labels.append(labels[labels >= 0])

    def compute(self) -> tuple[Tensor, Tensor]:
        return dim_zero_cat(self.features), dim_zero_cat(self.labels)


class FeatureProbes(L.Callback):
    """Logs <split>/knn<k>_top1 and <split>/probe_top1 in percent, and the same for raw pixels as
    <split>/pixels_knn<k>_top1 and <split>/pixels_probe_top1; prints them as a table.

    Does nothing for tasks without features, or without labels. A task that is not self-supervised hands out features,
    and has the data hand out a bank, once it is told that it is `probed`.

    Args:
        ks: numbers of neighbours, as DINO reports them; 20 is the usual one.
        temperature: of the neighbours' votes.
        epochs: of the linear probe; None: about 10,000 steps, but 10 epochs at least and 100 at most.
        rates: learning rates among which the probe's is chosen.
        held_out: share of the bank on which it is chosen.
        pixels: evaluate raw pixels too, where an image has at most 4,096 values.
    """

    def __init__(
        self,
        ks: Sequence[int] = (10, 20, 100, 200),
        temperature: float = 0.07,
        epochs: int | None = None,
        rates: Sequence[float] = RATES,
        held_out: float = 0.1,
        pixels: bool = True,
    ) -> None:
        if not ks or min(ks) < 1 or not temperature > 0:
            raise UserError(f"FeatureProbes: ks {list(ks)} must be at least 1 and temperature {temperature} above 0")
        if (epochs is not None and epochs < 1) or not rates or min(rates) <= 0 or not 0 < held_out < 1:
            raise UserError(
                f"FeatureProbes: epochs {epochs} must be at least 1, rates {list(rates)} above 0 and held_out "
                f"{held_out} between 0 and 1"
            )
        self.ks, self.temperature = tuple(ks), temperature
        self.epochs, self.rates, self.held_out = epochs, tuple(rates), held_out
        self.pixels = pixels
        self._seen: dict[str, list[LabelledFeatures]] = {}  # what -> [bank, query]
        self._of_pixels: dict[str, Figures] = {}  # by split: they never change
        self._active = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if hasattr(pl_module, "probed"):
            pl_module.probed = True  # type: ignore[assignment]

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == TrainerFn.FITTING
        last = trainer.global_step >= trainer.estimated_stepping_batches if fitting else True
        self._active = last and not trainer.sanity_checking
        self._seen = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._active, self._seen = True, {}

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        self._collect(pl_module, "val", *arguments[1:])

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: Any) -> None:
        self._collect(pl_module, "test", *arguments[1:])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._evaluate(trainer, pl_module, "test")

    def _collect(
        self, pl_module: L.LightningModule, split: str, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        features: Tensor | None = getattr(pl_module, "eval_features", None)
        if features is None or not self._active:
            return
        labels = batch["label"].where(batch["id"] >= 0, -1)
        self._add("features", dataloader_idx, features, labels)
        pixels = batch["image"].flatten(1)
        if self.pixels and split not in self._of_pixels and pixels.shape[1] <= MOST_PIXELS:
            self._add("raw pixels", dataloader_idx, pixels, labels)

    def _add(self, name: str, loader: int, features: Tensor, labels: Tensor) -> None:
        if name not in self._seen:
            self._seen[name] = [LabelledFeatures().to(features.device) for _ in (BANK, QUERY)]
        self._seen[name][loader].update(features, labels)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, split: str) -> None:
        seen, self._seen = self._seen, {}
        if not self._active or not seen:
            return
        found = {}
        for name, (bank, query) in seen.items():
            (x, y), (queries, labels) = bank.compute(), query.compute()
            if len(y) and len(labels):
                found[name] = self._judge(x, y, queries, labels)
        if "raw pixels" in found:
            self._of_pixels[split] = found["raw pixels"]
        if "features" not in found:
            return
        table = {"features": found["features"]}
        if split in self._of_pixels:
            table["raw pixels"] = self._of_pixels[split]
        for name, figures in table.items():
            prefix = f"{split}/" + ("" if name == "features" else "pixels_")
            values = {f"{prefix}knn{k}_top1": value for k, value in figures.neighbours.items()}
            if figures.linear is not None:
                values[f"{prefix}probe_top1"] = figures.linear.top1
            pl_module.log_dict(values, sync_dist=False)
        if trainer.is_global_zero:
            Console(width=WIDTH, highlight=False).print(self._table(split, table))

    def _judge(self, bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor) -> Figures:
        neighbours = knn_accuracies(bank, bank_labels, queries, labels, self.ks, self.temperature)
        linear: LinearAccuracy | None = None
        try:
            linear = linear_accuracy(bank, bank_labels, queries, labels, self.epochs, self.rates, self.held_out)
        except UserError as error:  # a run should not end for it
            log.warning("no linear probe: %s", error)
        return Figures(neighbours, linear, float(feature_rank(queries)))

    def _table(self, split: str, found: dict[str, Figures]) -> Table:
        columns = [f"{k}-NN" for k in self.ks]
        table = Table(f"{split} top-1, %", *columns, "linear", "chosen on training images", "rank")
        for name, (neighbours, linear, rank) in found.items():
            if linear is None:
                table.add_row(name, *(f"{neighbours[k]:.2f}" for k in self.ks), "", "", f"{rank:.1f}")
                continue
            edge = ", the sweep's end" if linear.at_edge else ""
            kind = "standardised" if linear.scaling == "each" else "as they are"
            chosen = f"rate {linear.rate:g}{edge}, {kind} ({linear.chosen_top1:.2f} there)"
            accuracies = (*(neighbours[k] for k in self.ks), linear.top1)
            table.add_row(name, *(f"{value:.2f}" for value in accuracies), chosen, f"{rank:.1f}")
        return table
