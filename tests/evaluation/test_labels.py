"""Scores of labels against scikit-learn and scipy, also where a class is never answered, in parts and in empty ones."""

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from moa_lightning.errors import UserError
from moa_lightning.evaluation.labels import LabelMetrics, label_metrics

COUNT = 60


def fed(classes: int, predictions: torch.Tensor, labels: torch.Tensor) -> LabelMetrics:
    """Updated in three parts, one of them empty."""
    metrics, losses = label_metrics(classes), torch.arange(float(len(labels)))
    for part in (slice(0, 17), slice(17, 17), slice(17, None)):
        metrics.update(losses[part], predictions[part], labels[part])
    return metrics


@pytest.mark.parametrize("answers", ["drawn", "constant", "perfect", "without 0"])
@pytest.mark.parametrize("classes", [2, 4])
def test_classes_are_judged_as_scikit_learn_does(classes: int, answers: str) -> None:
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (COUNT,), generator=generator)
    drawn = torch.where(torch.rand(COUNT, generator=generator) < 0.5, labels, labels.roll(1))
    predictions = {
        "drawn": drawn,
        "constant": torch.zeros_like(labels),
        "perfect": labels,
        "without 0": drawn.clamp(min=1),
    }[answers]
    found = fed(classes, predictions, labels).compute()
    expected = {
        "loss": (COUNT - 1) / 2,
        "accuracy": 100 * accuracy_score(labels, predictions),
        "macro_f1": 100 * f1_score(labels, predictions, average="macro"),
        "matthews": 100 * matthews_corrcoef(labels, predictions),
    }
    if classes == 2:
        expected["f1"] = 100 * f1_score(labels, predictions)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_class_that_nobody_has_or_answers_does_not_count() -> None:
    labels, predictions = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 0])
    found = fed(3, predictions, labels).compute()
    assert float(found["macro_f1"]) == pytest.approx(100 * (0.5 + 2 / 3) / 2)


def test_numbers_are_judged_as_scipy_does() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (COUNT,), generator=generator) / 2.0  # with ties
    predictions = labels + torch.randn(COUNT, generator=generator)
    found = fed(1, predictions, labels).compute()
    assert float(found["pearson"]) == pytest.approx(100 * pearsonr(predictions, labels)[0], rel=1e-5)
    assert float(found["spearman"]) == pytest.approx(100 * spearmanr(predictions, labels)[0], rel=1e-5)
    assert float(found["loss"]) == (COUNT - 1) / 2
    constant = fed(1, torch.ones(COUNT), labels).compute()
    assert (float(constant["pearson"]), float(constant["spearman"])) == (0, 0)


@pytest.mark.parametrize("classes", [1, 3])
def test_without_labels_there_is_no_score(classes: int) -> None:
    with pytest.raises(UserError, match="none of the samples"):
        fed(classes, torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)).compute()
