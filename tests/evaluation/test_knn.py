"""The weighted k-nearest-neighbour classifier: DINO's official numbers, the definition, torchmetrics' rules."""

import numpy as np
import pytest
import torch
from torch import Tensor

from moa_lightning.evaluation import KNNAccuracy, knn_votes
from tests.official import needs_official, official


@needs_official
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top1_and_top5_are_the_official_ones(dtype: torch.dtype) -> None:
    bank, queries, labels = official("knn_train").to(dtype), official("knn_test").to(dtype), official("knn_test_labels")
    votes = knn_votes(bank, official("knn_train_labels"), queries, classes=8, k=20, temperature=0.07)
    first_five = votes.topk(5, dim=1).indices
    top1 = 100 * (first_five[:, 0] == labels).double().mean()
    top5 = 100 * (first_five == labels[:, None]).any(1).double().mean()
    expected = official("knn_top1_top5_k20_T007")
    assert [top1.item(), top5.item()] == pytest.approx(expected.tolist(), abs=1e-6)


@needs_official
def test_the_metric_gives_the_official_top1_from_batches() -> None:
    metric = KNNAccuracy(k=20, temperature=0.07)
    for features, labels in zip(official("knn_train").split(64), official("knn_train_labels").split(64), strict=True):
        metric.add_bank(features, labels)
    for features, labels in zip(official("knn_test").split(33), official("knn_test_labels").split(33), strict=True):
        metric.update(features, labels)
    assert metric.compute().item() == pytest.approx(70.0, abs=1e-5)


def labelled(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return torch.randn(count, 6, generator=generator) + 0.8 * torch.eye(6)[labels], labels


@pytest.mark.parametrize("k", [1, 5, 30])
def test_votes_are_the_sum_of_the_neighbours_weights(k: int) -> None:
    (bank, bank_labels), (queries, _) = labelled(30, 0), labelled(1100, 1)  # more queries than a block holds
    votes = knn_votes(bank.double(), bank_labels, queries.double(), classes=4, k=k, temperature=0.1)
    for row in (0, 1023, 1024, 1099):
        query = queries[row].double().numpy()
        cosine = [b @ query / np.linalg.norm(b) / np.linalg.norm(query) for b in bank.double().numpy()]
        expected = np.zeros(4)
        for neighbour in np.argsort(cosine)[::-1][:k]:
            expected[bank_labels[neighbour]] += np.exp(cosine[neighbour] / 0.1)
        assert votes[row].numpy() == pytest.approx(expected, rel=1e-10)


def test_the_length_of_a_feature_does_not_matter() -> None:
    (bank, bank_labels), (queries, _) = labelled(30, 0), labelled(10, 1)
    scaled = bank * torch.rand(30, 1).add(0.1) * 9
    expected = knn_votes(bank, bank_labels, queries, 4)
    assert torch.allclose(knn_votes(scaled, bank_labels, 5 * queries, 4), expected, rtol=1e-4)


def test_a_bank_smaller_than_k_is_used_whole() -> None:
    (bank, bank_labels), (queries, _) = labelled(7, 0), labelled(5, 1)
    assert torch.equal(knn_votes(bank, bank_labels, queries, 4, k=20), knn_votes(bank, bank_labels, queries, 4, k=7))


def test_unlabelled_samples_are_left_out() -> None:
    (bank, bank_labels), (queries, labels) = labelled(40, 0), labelled(40, 1)
    metric, with_unknown = KNNAccuracy(k=5), KNNAccuracy(k=5)
    metric.add_bank(bank, bank_labels)
    metric.update(queries, labels)
    with_unknown.add_bank(torch.cat([bank, queries]), torch.cat([bank_labels, torch.full((40,), -1)]))
    with_unknown.update(torch.cat([queries, bank]), torch.cat([labels, torch.full((40,), -1)]))
    assert 25 < metric.compute() < 100  # better than chance, and not trivial
    assert with_unknown.compute() == metric.compute()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("missing", ["bank", "queries", "labels"])
def test_without_anything_to_compare_the_accuracy_is_not_a_number(missing: str) -> None:
    metric = KNNAccuracy()
    features, labels = labelled(5, 0)
    labels = torch.full_like(labels, -1) if missing == "labels" else labels
    if missing != "bank":
        metric.add_bank(features, labels)
    if missing != "queries":
        metric.update(features, labels)
    assert torch.isnan(metric.compute())


def test_reset_empties_the_bank_too() -> None:
    metric = KNNAccuracy(k=1)
    bank, labels = labelled(8, 0)
    metric.add_bank(bank, (labels + 1) % 4)  # all wrong
    metric.update(bank, labels)
    assert metric.compute() == 0
    metric.reset()
    metric.add_bank(bank, labels)
    metric.update(bank, labels)
    assert metric.compute() == 100


def test_a_larger_bank_after_a_result_is_seen() -> None:
    metric = KNNAccuracy(k=1)
    bank, labels = labelled(8, 0)
    metric.add_bank(bank[:1], labels[:1])
    metric.update(bank, labels)
    before = metric.compute()
    metric.add_bank(bank, labels)
    assert before < 100
    assert metric.compute() == 100
