"""The masked-patch loss against its formula, crop by crop in NumPy: loss, gradient and centre over several steps."""

import numpy as np
import pytest
import torch

from moa_lightning.losses.centering import Centering
from moa_lightning.losses.ibot import IBOTLoss, masked_positions
from tests.losses.test_centering import assignments

CROPS, PATCHES, PROTOTYPES = 5, 9, 6


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def expected(student: np.ndarray, q: np.ndarray, mask: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over crops of the mean over masked patches of the cross-entropy at temperature 0.1, and its gradient."""
    total, gradient = 0.0, np.zeros_like(student)
    for crop in range(CROPS):
        hidden = np.flatnonzero(mask[crop])
        for patch in hidden:
            p = softmax(student[crop, patch] / 0.1)
            total -= (q[crop, patch] * np.log(p)).sum() / len(hidden) / CROPS
            gradient[crop, patch] = (p - q[crop, patch]) / 0.1 / len(hidden) / CROPS
    return total, gradient


@pytest.mark.parametrize("centering", ["mean", "sinkhorn_knopp"])
def test_loss_gradient_and_centre_over_several_steps(centering: Centering) -> None:
    rng, loss, center = np.random.default_rng(0), IBOTLoss(PROTOTYPES, 0.1, 0.8, centering).double(), np.zeros(6)
    for step, temperature in enumerate((0.04, 0.05, 0.06, 0.07)):
        student, teacher = rng.normal(size=(2, CROPS, PATCHES, PROTOTYPES)) * 0.3
        mask = rng.random((CROPS, PATCHES)) < 0.4
        mask[step] = False  # a crop without masked patches
        q = np.zeros_like(teacher)
        if centering == "mean":
            q[mask] = softmax((teacher[mask] - center) / temperature)
            center = 0.8 * center + 0.2 * teacher[mask].mean(0)
        else:
            q[mask] = assignments(teacher[mask], temperature)
        positions, weights = map(torch.from_numpy, masked_positions(mask))
        rows = torch.from_numpy(student).requires_grad_()
        targets = torch.from_numpy(teacher).flatten(0, 1)[positions]
        value = loss(rows.flatten(0, 1)[positions], targets, weights.double(), temperature)
        value.backward()
        loss.update_center(targets)
        total, gradient = expected(student, q, mask)
        assert value.item() == pytest.approx(total, rel=1e-6)  # the weights are float32
        np.testing.assert_allclose(rows.grad.numpy(), gradient, rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(loss.center[0].numpy(), center, atol=1e-14)
    assert (np.abs(center).max() > 0.01) == (centering == "mean")


@pytest.mark.parametrize("centering", ["mean", "sinkhorn_knopp"])
def test_without_masked_patches_the_loss_is_zero_and_the_centre_stays(centering: Centering) -> None:
    positions, weights = map(torch.from_numpy, masked_positions(np.zeros((4, 9), dtype=bool)))
    loss, outputs = IBOTLoss(PROTOTYPES, centering=centering), torch.zeros(0, PROTOTYPES, requires_grad=True)
    loss.center.fill_(0.5)
    value = loss(outputs[positions], outputs.detach(), weights, 0.04)
    value.backward()
    loss.update_center(outputs.detach())
    assert value == 0
    assert torch.equal(loss.center, torch.full((1, PROTOTYPES), 0.5))
