"""How well labels are predicted: the scores of GLUE and SuperGLUE, in percent, as their leaderboards have them.

    classes    accuracy; F1 of class 1, where there are two; macro F1, the mean of all classes' F1;
               Matthews correlation (c n - sum t_k p_k) / sqrt((n² - sum p_k²) (n² - sum t_k²)),
               t and p counts of true and predicted classes, c of right answers (Gorodkin, 2004)
    numbers    Pearson's and Spearman's correlation

A score whose denominator is zero is 0, as scikit-learn has it and as a constant answer deserves. (torchmetrics 1.9
gives a constant answer that is right for 100 of 150 a Matthews correlation of 0.06.) States add up over processes, some
of which may be empty.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from ..errors import UserError


class LabelMetrics(Metric):
    """Mean loss and scores. Subclasses keep what their scores need."""

    losses: Tensor
    count: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, predictions: Tensor, labels: Tensor) -> None:
        """Of each sample the loss, what is predicted and what is right, (n,) each; n may be 0."""
        self.losses += losses.double().sum()
        self.count += len(losses)
        self.keep(predictions, labels)

    def keep(self, predictions: Tensor, labels: Tensor) -> None:
        raise TypeError(f"{type(self).__name__} keeps nothing")

    def compute(self) -> dict[str, Tensor]:
        """The mean loss and the scores.

        Raises:
            UserError: no sample had a label.
        """
        if not self.count:
            raise UserError("none of the samples to be judged has a label: evaluate on data that have some")
        return {"loss": self.losses / self.count, **{name: 100 * value for name, value in self.scores().items()}}

    def scores(self) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} has no scores")


class ClassMetrics(LabelMetrics):
    """Of classes 0 to `classes` - 1."""

    confusion: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        default = torch.zeros(classes, classes, dtype=torch.int64)
        self.add_state("confusion", default=default, dist_reduce_fx="sum")  # rows: right, columns: predicted

    def keep(self, predictions: Tensor, labels: Tensor) -> None:
        classes = len(self.confusion)
        self.confusion += torch.bincount(labels * classes + predictions, minlength=classes**2).view(classes, classes)

    def scores(self) -> dict[str, Tensor]:
        confusion = self.confusion.double()
        right, true, predicted, n = confusion.diag(), confusion.sum(1), confusion.sum(0), confusion.sum()
        there = true + predicted > 0  # a class that nobody has or answers does not count
        f1 = _ratio(2 * right, true + predicted)
        covariance = right.sum() * n - true @ predicted
        spread = (n**2 - predicted @ predicted) * (n**2 - true @ true)
        found = {
            "accuracy": right.sum() / n,
            "macro_f1": f1[there].mean(),
            "matthews": _ratio(covariance, spread.sqrt()),
        }
        return {**found, "f1": f1[1]} if len(f1) == 2 else found


class NumberMetrics(LabelMetrics):
    """Of numbers."""

    predictions: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("predictions", "labels"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def keep(self, predictions: Tensor, labels: Tensor) -> None:
        self.predictions.append(predictions.double())
        self.labels.append(labels.double())

    def scores(self) -> dict[str, Tensor]:
        predictions, labels = dim_zero_cat(self.predictions), dim_zero_cat(self.labels)
        if len(labels) < 2 or (predictions == predictions[0]).all() or (labels == labels[0]).all():
            return dict.fromkeys(score_names(1), torch.zeros((), dtype=torch.float64, device=labels.device))
        return {
            "pearson": pearson_corrcoef(predictions, labels),
            "spearman": spearman_corrcoef(predictions, labels),
        }


def score_names(classes: int) -> tuple[str, ...]:
    """The scores of labels of so many classes; 1: of numbers."""
    if classes == 1:
        return "pearson", "spearman"
    return "accuracy", *(("f1",) if classes == 2 else ()), "macro_f1", "matthews"


def label_metrics(classes: int) -> LabelMetrics:
    """What judges labels of so many classes; 1: numbers."""
    return NumberMetrics() if classes == 1 else ClassMetrics(classes)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator.where(denominator > 0, 1.0), 0.0)
