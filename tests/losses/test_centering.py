"""Sinkhorn-Knopp against the products of the published algorithm in NumPy, and targets over several processes."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from moa_lightning.losses import DINOLoss
from moa_lightning.losses import centering as module
from moa_lightning.losses.centering import CenteredLoss, sinkhorn_knopp


def outputs(n: int = 12, prototypes: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, prototypes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assignments(teacher: np.ndarray, temperature: float, iterations: int = 3) -> np.ndarray:
    """Rows to the same total 1/K, columns to the same total 1/n, of a (K, n) matrix that sums to 1; in the end each
    column is scaled to 1. (n, K)"""
    q = np.exp(teacher / temperature).T
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * len(q)
        q /= q.sum(0, keepdims=True) * q.shape[1]
    return (q * q.shape[1]).T


@pytest.mark.parametrize("temperature", [0.04, 0.07, 1.0])
def test_it_is_the_published_algorithm(temperature: float) -> None:
    teacher = outputs()
    found = sinkhorn_knopp(teacher / temperature).exp().numpy()
    np.testing.assert_allclose(found, assignments(teacher.numpy(), temperature), rtol=1e-11)
    single = sinkhorn_knopp(teacher.float() / temperature)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.exp().numpy(), found, atol=2e-5)


def test_samples_sum_to_one_and_prototypes_are_used_alike() -> None:
    q = sinkhorn_knopp(outputs() / 0.1).exp()
    assert torch.allclose(q.sum(1), torch.ones(12, dtype=q.dtype), atol=1e-12)
    far = (q.sum(0) - 12 / 7).abs().max()
    settled = sinkhorn_knopp(outputs() / 0.1, iterations=2000).exp()
    assert torch.allclose(settled.sum(1), torch.ones(12, dtype=q.dtype), atol=1e-12)
    assert (settled.sum(0) - 12 / 7).abs().max() < 1e-3 < far


def test_logits_whose_exponentials_overflow_are_no_matter() -> None:
    q = sinkhorn_knopp(1e4 * outputs().float()).exp()
    assert torch.allclose(q.sum(1), torch.ones(12))


def test_the_loss_and_its_gradient_with_assignments_for_targets() -> None:
    student, teacher = outputs(8, seed=1).requires_grad_(), outputs(4, seed=2)
    loss = DINOLoss(7, centering="sinkhorn_knopp").double()
    value, entropy = loss(student, teacher, 0.05)
    value.backward()
    q = assignments(teacher.numpy(), 0.05).reshape(2, 2, 7)
    s = student.detach().numpy().reshape(4, 2, 7) / 0.1
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    pairs = [(t, c) for t in range(2) for c in range(4) if t != c]
    expected = np.mean([-(q[t] * np.log(p[c])).sum(-1).mean() for t, c in pairs])
    gradient = np.zeros_like(s)
    for t, c in pairs:
        gradient[c] += (p[c] - q[t]) / 0.1 / 2 / len(pairs)
    assert value.item() == pytest.approx(expected, rel=1e-11)
    np.testing.assert_allclose(student.grad.numpy(), gradient.reshape(8, 7), atol=1e-12)
    assert entropy.item() == pytest.approx(-(q * np.log(q)).sum(-1).mean(), rel=1e-9)
    loss.update_center(teacher)
    assert not loss.center.any()


def test_a_teacher_that_says_the_same_of_all_images_has_the_largest_entropy() -> None:
    """By which a collapse is told, see callbacks/collapse.py."""
    _, entropy = DINOLoss(7, centering="sinkhorn_knopp")(outputs(8), outputs(1).expand(4, -1), 0.04)
    assert entropy.item() == pytest.approx(np.log(7), rel=1e-9)


def test_the_loss_is_summed_in_float32_under_autocast() -> None:
    student, teacher, loss = outputs(8).float(), outputs(4).float(), DINOLoss(7)
    expected = loss(student, teacher, 0.05)[0]
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(student, teacher, 0.05)[0] == expected


class Reducer:
    """all_reduce between threads, in the place of torch.distributed."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, world_size: int) -> None:
        self.barrier, self.given = threading.Barrier(world_size, timeout=30), {}

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def all_reduce(self, tensor: torch.Tensor, op: torch.distributed.ReduceOp = ReduceOp.SUM) -> None:
        self.given[threading.get_ident()] = tensor.clone()
        self.barrier.wait()
        stack = torch.stack(list(self.given.values()))
        self.barrier.wait()
        tensor.copy_(stack.amax(0) if op == self.ReduceOp.MAX else stack.sum(0))


def on_each(parts: list[torch.Tensor], work: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    results: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        results[index] = work(parts[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(parts))]


@pytest.mark.parametrize("sizes", [(6, 6), (9, 3), (12, 0)])
def test_unequal_parts_of_two_processes_make_the_targets_and_the_centre_of_one(monkeypatch, sizes) -> None:
    """A process may have no masked patch at all."""
    teacher = outputs()
    whole = CenteredLoss(7, centering="sinkhorn_knopp").log_targets(teacher, 0.1)
    mean = CenteredLoss(7).double()
    mean.update_center(teacher)
    parts = list(teacher.split(list(sizes)))
    several = CenteredLoss(7).double()
    for part in parts:  # micro-batches of one step
        several.note(part)
        assert several.center.abs().max() == 0
    several.move_center()
    assert torch.allclose(several.center, mean.center, rtol=0, atol=1e-15)
    several.move_center()
    assert torch.allclose(several.center, mean.center, rtol=0, atol=1e-15), "nothing was noted since"

    monkeypatch.setattr(module, "dist", Reducer(2))
    found = on_each(parts, lambda part: CenteredLoss(7, centering="sinkhorn_knopp").log_targets(part, 0.1))
    assert torch.allclose(torch.cat(found), whole, rtol=0, atol=1e-12)

    def center(part: torch.Tensor) -> torch.Tensor:
        loss = CenteredLoss(7).double()
        loss.update_center(part)
        return loss.center

    monkeypatch.setattr(module, "dist", Reducer(2))
    for moved in on_each(parts, center):
        assert torch.allclose(moved, mean.center, rtol=0, atol=1e-15)
    assert mean.center.abs().max() > 0.01
