"""The probe beside a net: what it learns, what it leaves out, and that it goes on exactly."""

import torch
import torch.nn.functional as F

from moa_lightning.evaluation import LinearProbe


def samples(seed: int, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three points, away from zero and of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    noise = torch.randn(count, 3, generator=generator)
    return (F.one_hot(labels, 3) * 4 + noise) * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor(
        [5.0, 50.0, 0.05]
    ), labels


def trained(steps: int, probe: LinearProbe | None = None, first: int = 0) -> LinearProbe:
    probe = probe or LinearProbe(3, 3)
    for step in range(first, steps):
        probe.update(*samples(step))
    return probe


def test_it_learns_to_tell_classes_apart() -> None:
    features, labels = samples(999, 1000)
    assert (trained(100).predict(features) == labels).float().mean() > 0.95


def test_the_first_gradient_is_autograds() -> None:
    features, labels = samples(0)
    probe = LinearProbe(3, 3)
    probe.update(features, labels)
    x = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
    x = torch.cat([x, torch.ones(64, 1)], 1)
    weight = torch.zeros(3, 4, requires_grad=True)
    F.cross_entropy(x @ weight.T, labels).backward()
    assert torch.allclose(probe.state["first"], 0.1 * weight.grad, atol=2e-4)


def test_a_restored_probe_goes_on_bit_by_bit() -> None:
    whole, half = trained(20), trained(10)
    resumed = trained(20, LinearProbe.from_state(half.state_dict(), "cpu"), first=10)
    assert all(torch.equal(resumed.state[name], value) for name, value in whole.state.items())


def test_unlabelled_and_broken_samples_change_nothing() -> None:
    features, labels = samples(5)
    odd = torch.cat([features, features[:2], torch.full((1, 3), torch.nan)])
    marks = torch.cat([labels, torch.tensor([-1, -1, 0])])
    plain, mixed = trained(3), trained(3)
    plain.update(features, labels)
    mixed.update(odd, marks)
    assert all(torch.allclose(mixed.state[name], value, rtol=1e-5) for name, value in plain.state.items())
    before = mixed.state_dict()
    mixed.update(features, torch.full_like(labels, -1))
    assert all(torch.equal(mixed.state[name], value) for name, value in before.items())
