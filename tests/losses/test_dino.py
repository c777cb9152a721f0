"""DINO's loss and centre: five steps of the official implementation, and what follows from the definition."""

import math

import pytest
import torch

from moa_lightning.losses import DINOLoss
from tests.official import EXACT, SINGLE, close, needs_official, official


def run_official(loss: DINOLoss, dtype: torch.dtype):
    """(step, loss, gradient for the student's outputs, centre after the step) of the five official steps."""
    temperatures = official("dino_teacher_temp_schedule").tolist()
    for step, temperature in enumerate(temperatures[:5]):
        student = official("dino_student")[step].to(dtype).requires_grad_()
        teacher = official("dino_teacher")[step].to(dtype)
        value, _ = loss(student, teacher, temperature)
        value.backward()
        loss.update_center(teacher)
        yield step, value.detach(), student.grad, loss.center.clone()


@needs_official
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_loss_gradient_and_centre_are_the_official_ones(dtype, tolerance) -> None:
    steps = list(run_official(DINOLoss(17).to(dtype), dtype))
    assert len(steps) == 5
    for step, value, gradient, center in steps:
        assert close(value, official("dino_loss")[step], tolerance), f"loss of step {step}"
        assert close(gradient, official("dino_student_grad")[step], tolerance), f"gradient of step {step}"
        assert close(center, official("dino_center_after")[step], tolerance), f"centre after step {step}"


def outputs(crops: int, batch: int = 3, prototypes: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(crops)
    return torch.randn(crops * batch, prototypes, generator=generator, dtype=torch.float64)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = outputs(4).requires_grad_(), outputs(2).requires_grad_()
    DINOLoss(7)(student, teacher, 0.04)[0].backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_crop_is_not_compared_with_itself() -> None:
    """With two crops the student's first is judged by the teacher's second alone, and the other way round."""
    student, teacher = outputs(2), outputs(2)
    log_p = (student / 0.1).log_softmax(-1).unflatten(0, (2, 3))
    q = (teacher / 0.05).softmax(-1).unflatten(0, (2, 3))
    expected = -((q[0] * log_p[1]).sum(-1).mean() + (q[1] * log_p[0]).sum(-1).mean()) / 2
    loss, _ = DINOLoss(7)(student, teacher, 0.05)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_centre_is_a_running_mean_of_the_teacher() -> None:
    loss, teacher = DINOLoss(7, center_momentum=0.75).double(), outputs(2)
    loss.update_center(teacher)
    loss.update_center(2 * teacher)
    expected = (0.75 * 0.25 + 0.25 * 2) * teacher.mean(0, keepdim=True)
    assert close(loss.center, expected, 1e-12)


def test_a_constant_in_all_teacher_outputs_is_centred_away() -> None:
    student, teacher, shift = outputs(4), outputs(2), torch.linspace(-3, 3, 7).double()
    plain, shifted = DINOLoss(7).double(), DINOLoss(7).double()
    shifted.center.copy_(shift)
    expected = plain(student, teacher, 0.04)[0]
    assert shifted(student, teacher + shift, 0.04)[0].item() == pytest.approx(expected.item(), rel=1e-10)


def test_entropy_is_log_k_for_a_uniform_teacher_and_zero_for_a_sharp_one() -> None:
    loss = DINOLoss(7)
    _, uniform = loss(outputs(2), torch.zeros(6, 7), 0.04)
    _, sharp = loss(outputs(2), 100 * torch.eye(7)[:6], 0.04)
    assert uniform.item() == pytest.approx(math.log(7), rel=1e-6)
    assert sharp.item() == pytest.approx(0.0, abs=1e-6)


def test_half_precision_outputs_are_summed_in_float32() -> None:
    student, teacher = outputs(4).bfloat16(), outputs(2).bfloat16()
    loss, _ = DINOLoss(7)(student, teacher, 0.04)
    assert loss.dtype == torch.float32
    assert loss == DINOLoss(7)(student.float(), teacher.float(), 0.04)[0]


@pytest.mark.parametrize(("student", "teacher"), [(7, 6), (6, 5)])
def test_outputs_that_are_not_whole_crops_are_refused(student: int, teacher: int) -> None:
    with pytest.raises(ValueError, match="whole crops"):
        DINOLoss(7)(torch.zeros(student, 7), torch.zeros(teacher, 7), 0.04)


def test_the_centre_is_saved() -> None:
    loss = DINOLoss(7)
    loss.update_center(outputs(2))
    other = DINOLoss(7)
    other.load_state_dict(loss.state_dict())
    assert other.center.abs().sum() > 0
    assert torch.equal(other.center, loss.center)


def test_the_entropy_of_the_mean_tells_one_prototype_from_many() -> None:
    loss, student = DINOLoss(7).double(), outputs(4)
    one_hot = 100 * torch.eye(7, dtype=torch.float64)
    for teacher, expected in ((one_hot[[2] * 6], 0.0), (one_hot[[0, 1, 2, 0, 1, 2]], math.log(3))):
        loss(student, teacher, 0.05)
        assert loss.mean_entropy.item() == pytest.approx(expected, abs=1e-9)
