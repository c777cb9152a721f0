"""The linear evaluation: the same steps as torch's own SGD, as good as scikit-learn, and blind to the queries."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from moa_lightning.errors import UserError
from moa_lightning.evaluation import knn_accuracies, linear_accuracy
from moa_lightning.evaluation.linear_sweep import LinearClassifiers, default_epochs, set_aside


def clouds(count: int, seed: int, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Five overlapping classes in eight dimensions of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (count,), generator=generator)
    centres = torch.randn(5, 8, generator=torch.Generator().manual_seed(99))
    x = centres[labels] + spread * torch.randn(count, 8, generator=generator)
    return x * torch.logspace(-2, 2, 8) + 3, labels


def test_the_steps_are_torchs_sgd_with_a_cosine() -> None:
    features, labels = clouds(300, 0)
    rates = (0.01, 0.1)
    ours = LinearClassifiers(features, "each", 5, rates)
    ours.fit(features, labels, epochs=3, seed=4)
    x = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    for number, rate in enumerate(rates):
        layer = torch.nn.Linear(8, 5)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
        generator = torch.Generator().manual_seed(4)
        for _ in range(3):
            chosen = torch.randperm(300, generator=generator)[:256]
            optimizer.zero_grad()
            F.cross_entropy(layer(x[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
        assert torch.allclose(ours.weight[number], layer.weight, atol=1e-5)
        assert torch.allclose(ours.bias[number], layer.bias, atol=1e-5)
        expected = (layer(x).argmax(-1) == labels).double().mean() * 100
        assert ours.top1(features, labels)[number] == pytest.approx(float(expected), abs=1e-4)


def test_it_is_as_good_as_scikit_learns_logistic_regression() -> None:
    (bank, bank_labels), (queries, labels) = clouds(4000, 0), clouds(4000, 1)
    mean, std = bank.mean(0), bank.std(0)
    reference = LogisticRegression(C=1e4, max_iter=1000)
    reference.fit(((bank - mean) / std).numpy(), bank_labels.numpy())
    expected = 100 * reference.score(((queries - mean) / std).numpy(), labels.numpy())
    found = linear_accuracy(bank, bank_labels, queries, labels, epochs=30)
    assert 60 < expected < 95
    assert found.top1 == pytest.approx(expected, abs=0.5)
    assert found.scaling == "each"
    assert not found.at_edge


def test_rate_and_scaling_do_not_look_at_the_queries() -> None:
    (bank, bank_labels), (queries, labels) = clouds(600, 0), clouds(200, 1)
    found = linear_accuracy(bank, bank_labels, queries, labels, epochs=2)
    wrong = linear_accuracy(bank, bank_labels, queries, (labels + 1) % 5, epochs=2)
    assert (wrong.rate, wrong.scaling, wrong.chosen_top1) == (found.rate, found.scaling, found.chosen_top1)
    assert wrong.top1 < found.top1
    least = linear_accuracy(bank, bank_labels, queries, labels, epochs=2, rates=(1e-9, 1e-8))
    assert least.at_edge
    assert linear_accuracy(bank, bank_labels, queries, labels, epochs=2) == found


def test_few_images_are_seen_a_hundred_times_and_a_million_ten_times_and_a_handful_in_a_thousand_steps() -> None:
    assert [default_epochs(count) for count in (3_500, 51_200, 1_281_167)] == [100, 50, 10]
    assert [default_epochs(count) * max(1, count // 256) for count in (5, 300, 1_000)] == [1000, 1000, 1002]


def test_single_images_are_never_set_aside_and_no_probe_is_made_of_them_alone() -> None:
    features, one_each = clouds(5, 0)[0], torch.arange(5)
    with pytest.raises(UserError, match="no class has two"):
        linear_accuracy(features, one_each, features, one_each)
    labels = torch.tensor([0, 0, 1, 2, 2])
    assert labels[~set_aside(labels, 0.9)].unique().tolist() == [0, 1, 2]
    assert linear_accuracy(features, labels, features, labels, epochs=50).top1 == 100


def test_a_share_of_every_class_is_set_aside() -> None:
    labels = torch.cat([torch.zeros(100), torch.ones(30), torch.full((3,), 2)]).long()
    aside = set_aside(labels, 0.1)
    assert labels[aside].bincount().tolist() == [10, 3, 1]
    assert torch.equal(aside, set_aside(labels, 0.1))
    assert aside[:100].nonzero().flatten().tolist() != list(range(10))


def test_several_k_are_those_of_a_slow_search() -> None:
    (bank, bank_labels), (queries, labels) = clouds(60, 0, 2.0), clouds(40, 1, 2.0)
    found = knn_accuracies(bank, bank_labels, queries, labels, (1, 7, 100), temperature=0.1)
    for k, accuracy in found.items():
        right = 0
        for query, label in zip(queries.double(), labels.tolist(), strict=True):
            cosine = [float(F.cosine_similarity(query, each, dim=0)) for each in bank.double()]
            votes = torch.zeros(5, dtype=torch.float64)
            for position in sorted(range(60), key=lambda i: -cosine[i])[:k]:
                votes[bank_labels[position]] += torch.tensor(cosine[position] / 0.1).exp()
            right += int(votes.argmax() == label)
        assert accuracy == pytest.approx(100 * right / 40, abs=1e-4), k
