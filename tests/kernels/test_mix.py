"""The mix against the NumPy reference: values, gradients, what it stores, what it does at the edges of floats.

`auto` is the C++ kernel in float32 and bfloat16, torch operations in float64. test_parity.py has the other kernels.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from moa_lightning.errors import UserError
from moa_lightning.kernels import Kernel, mix, mix_pairs
from tests import reference as numpy_reference
from tests.layers import bytes_of, saved_tensors
from tests.reference import SEVEN

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-3}  # bf16: rounded once, 2^-8 at most
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 33), (1, 2, 3, 7)], ids=str)
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["per_token", "shared"])
PAIRS = ("identity", "gelu", "relu2")
KERNELS = pytest.mark.parametrize("kernel", ["auto", "recompute", "reference"])


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaf(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return randn(*shape, seed=seed, dtype=dtype).requires_grad_()


def coefficient_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def flat(value: Tensor, keep: int = 1) -> np.ndarray:
    """(N, last `keep` axes) in float64."""
    return value.detach().double().numpy().reshape(-1, *value.shape[value.dim() - keep :])


def assert_close(ours: Tensor, theirs: np.ndarray, tolerance: float) -> None:
    difference = np.linalg.norm(ours.detach().double().numpy().reshape(theirs.shape) - theirs)
    assert difference <= tolerance * np.linalg.norm(theirs)


@KERNELS
@DTYPES
@SHARED
@SHAPES
def test_mix_agrees_with_the_reference(shape, shared: bool, dtype: torch.dtype, kernel: Kernel) -> None:
    u = leaf(*shape, seed=1, dtype=dtype)
    c = leaf(*(() if shared else shape[:-1]), 7, seed=2, dtype=coefficient_dtype(dtype))
    dy = randn(*shape, seed=3, dtype=dtype)
    y = mix(u, c, SEVEN, kernel=kernel)
    y.backward(dy)
    tokens = flat(u).shape[0]
    c64 = np.broadcast_to(flat(c), (tokens, 7))
    du, dc = numpy_reference.mix_gradient(flat(u), c64, SEVEN, flat(dy))
    assert (y.dtype, u.grad.dtype, c.grad.dtype) == (dtype, dtype, c.dtype)
    assert_close(y, numpy_reference.mix(flat(u), c64, SEVEN), TOLERANCE[dtype])
    assert_close(u.grad, du, TOLERANCE[dtype])
    assert_close(c.grad, dc.sum(0) if shared else dc, TOLERANCE[c.dtype])


@KERNELS
@DTYPES
@SHARED
@SHAPES
def test_mix_pairs_agrees_with_the_reference(shape, shared: bool, dtype: torch.dtype, kernel: Kernel) -> None:
    a, b = leaf(*shape, seed=1, dtype=dtype), leaf(*shape, seed=4, dtype=dtype)
    c = leaf(*(() if shared else shape[:-1]), 3, 3, seed=2, dtype=coefficient_dtype(dtype))
    dy = randn(*shape, seed=3, dtype=dtype)
    y = mix_pairs(a, b, c, PAIRS, kernel)
    y.backward(dy)
    c64 = np.broadcast_to(flat(c, 2), (flat(a).shape[0], 3, 3))
    da, db, dc = numpy_reference.mix_pairs_gradient(flat(a), flat(b), c64, PAIRS, flat(dy))
    assert (y.dtype, a.grad.dtype, c.grad.dtype) == (dtype, dtype, c.dtype)
    assert_close(y, numpy_reference.mix_pairs(flat(a), flat(b), c64, PAIRS), TOLERANCE[dtype])
    assert_close(a.grad, da, TOLERANCE[dtype])
    assert_close(b.grad, db, TOLERANCE[dtype])
    assert_close(c.grad, dc.sum(0) if shared else dc, TOLERANCE[c.dtype])


def _as_stored(value: Tensor) -> Tensor:
    """The same numbers in a layout that is not contiguous."""
    return torch.empty(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)[..., ::2].copy_(value)


@pytest.mark.parametrize("layout", [_as_stored, lambda t: t.mT.contiguous().mT], ids=["strided", "transposed"])
def test_inputs_need_not_be_contiguous(layout) -> None:
    values = [
        randn(4, 5, seed=1),
        randn(4, 5, seed=2),
        randn(4, 7, seed=3),
        randn(4, 3, 3, seed=4),
        randn(4, 5, seed=5),
    ]
    results = []
    for arrange in (torch.clone, layout):
        a, b, c, square = (arrange(value).requires_grad_() for value in values[:4])
        assert a.is_contiguous() == (arrange is torch.clone)
        outputs = mix(a, c, SEVEN), mix_pairs(a, b, square, PAIRS)
        torch.autograd.backward(outputs, (arrange(values[4]), arrange(values[4])))
        results.append((*outputs, a.grad, b.grad, c.grad, square.grad))
    for contiguous, other in zip(*results, strict=True):
        torch.testing.assert_close(other, contiguous, rtol=1e-13, atol=1e-13)


@SHARED
def test_an_empty_batch_has_empty_results(shared: bool) -> None:
    u, b = leaf(0, 5, seed=1), leaf(0, 5, seed=2)
    c = leaf(*(() if shared else (0,)), 7, seed=3)
    square = leaf(*(() if shared else (0,)), 3, 3, seed=4)
    y, z = mix(u, c, SEVEN), mix_pairs(u, b, square, PAIRS)
    (y.sum() + z.sum()).backward()
    assert y.shape == z.shape == u.grad.shape == b.grad.shape == (0, 5)
    assert torch.equal(c.grad, torch.zeros_like(c))
    assert torch.equal(square.grad, torch.zeros_like(square))


def test_a_single_vector_without_token_axes() -> None:
    u, c = randn(5, seed=1), randn(7, seed=2)
    assert_close(mix(u, c, SEVEN), numpy_reference.mix(u.numpy()[None], c.numpy()[None], SEVEN)[0], 1e-12)


# --- the edges of floats ----------------------------------------------------------------------------------------------


@KERNELS
def test_nan_shows_in_its_own_place_only(kernel: Kernel) -> None:
    u, b = randn(3, 4, seed=1), randn(3, 4, seed=2)
    clean = mix(u, randn(3, 7, seed=3), SEVEN, kernel=kernel), mix_pairs(u, b, randn(3, 3, 3, seed=4), PAIRS, kernel)
    u[1, 2] = torch.nan
    spoilt = mix(u, randn(3, 7, seed=3), SEVEN, kernel=kernel), mix_pairs(u, b, randn(3, 3, 3, seed=4), PAIRS, kernel)
    for before, after in zip(clean, spoilt, strict=True):
        assert after[1, 2].isnan()
        after[1, 2] = before[1, 2]
        torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SEVEN)
def test_nan_spoils_the_gradients_of_its_token_only(name: str) -> None:
    u, c = randn(3, 4, seed=1), leaf(3, 1, seed=2)
    u[1, 2] = torch.nan
    mix(u.requires_grad_(), c, (name,)).sum().backward()
    assert c.grad.isnan().flatten().tolist() == [False, True, False]
    assert u.grad[[0, 2]].isfinite().all()


@KERNELS
def test_values_at_infinity(kernel: Kernel) -> None:
    u = torch.tensor([torch.inf, -torch.inf])
    for name, expected in {
        "identity": (torch.inf, -torch.inf),
        "relu": (torch.inf, 0.0),
        "leaky_relu": (torch.inf, -torch.inf),
        "relu2": (torch.inf, 0.0),
        "tanh": (1.0, -1.0),
    }.items():
        assert mix(u, torch.ones(1), (name,), kernel=kernel).tolist() == list(expected), name


def test_slopes_at_infinity_are_their_limits() -> None:
    limits = {
        "identity": (1, 1),
        "gelu": (1, 0),
        "silu": (1, 0),
        "relu": (1, 0),
        "leaky_relu": (1, 0.01),
        "relu2": (torch.inf, 0),
        "tanh": (0, 0),
    }
    for name, expected in limits.items():
        u = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64, requires_grad=True)
        mix(u, torch.ones(1), (name,)).sum().backward()
        assert u.grad.tolist() == list(expected), name


@KERNELS
@pytest.mark.parametrize("huge", [1e30, torch.inf])
def test_a_coefficient_of_zero_hides_an_overflow(huge: float, kernel: Kernel) -> None:
    u = torch.tensor([[huge, -2.0, 3.0]])  # relu2 overflows float32 at 1e30
    c = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]])
    torch.testing.assert_close(mix(u, c, SEVEN, kernel=kernel), 0.5 * torch.tanh(u))
    b = torch.tensor([[1.0, 2.0, -1.0]])
    square = torch.zeros(1, 3, 3)
    square[0, 1, 0] = 0.25  # tanh(a) · b
    names = ("relu2", "tanh", "identity")
    torch.testing.assert_close(mix_pairs(u, b, square.roll(2, 2), names, kernel), 0.25 * torch.tanh(u) * b)
    torch.testing.assert_close(mix_pairs(b, u, square.roll(2, 2).mT, names, kernel), 0.25 * torch.tanh(u) * b)


@pytest.mark.parametrize("huge", [1e30, torch.inf])
def test_a_coefficient_of_zero_hides_an_overflow_in_the_backward_pass(huge: float) -> None:
    u = torch.tensor([[huge, -2.0, 3.0]], requires_grad=True)
    names = ("relu2", "tanh", "leaky_relu")
    c = torch.tensor([[0.0, 0.5, 0.0]], requires_grad=True)
    mix(u, c, names).sum().backward()
    torch.testing.assert_close(u.grad, 0.5 * (1 - torch.tanh(u.detach()).square()))
    torch.testing.assert_close(c.grad[0, 1], torch.tanh(u.detach()).sum())

    names = ("relu2", "tanh", "identity")
    a, b = u.detach().requires_grad_(), torch.tensor([[1.0, 2.0, -1.0]], requires_grad=True)
    square = torch.zeros(1, 3, 3)
    square[0, 1, 2] = 0.25  # tanh(a) · b
    square.requires_grad_()
    mix_pairs(a, b, square, names).sum().backward()
    torch.testing.assert_close(a.grad, 0.25 * (1 - torch.tanh(u.detach()).square()) * b.detach())
    torch.testing.assert_close(b.grad, 0.25 * torch.tanh(u.detach()))
    torch.testing.assert_close(square.grad[0, 1, 2], (torch.tanh(u.detach()) * b.detach()).sum())

    b, a = u.detach().requires_grad_(), b.detach().requires_grad_()
    mix_pairs(a, b, square.detach().mT, names).sum().backward()  # a · tanh(b)
    torch.testing.assert_close(b.grad, 0.25 * (1 - torch.tanh(u.detach()).square()) * a.detach())
    torch.testing.assert_close(a.grad, 0.25 * torch.tanh(u.detach()))


@KERNELS
@pytest.mark.parametrize(("huge", "name"), [(1e30, "relu2"), (3e38, "relu2"), (1e30, "gelu_tanh")])
def test_a_coefficient_of_zero_hides_an_overflow_of_its_slope_too(huge: float, name: str, kernel: Kernel) -> None:
    """At 3e38 the slope of ReLU² overflows too; at 1e30 that of the tanh GELU is NaN, its value finite."""
    a = torch.full((1, 1), huge, requires_grad=True)
    mix(a, torch.tensor([0.0, 1.0]), (name, "tanh"), kernel=kernel).sum().backward()
    assert abs(a.grad.item()) < 1e-12
    a, b = torch.full((1, 1), huge, requires_grad=True), torch.full((1, 1), 2.0, requires_grad=True)
    mix_pairs(a, b, torch.tensor([[0.0, 0.0], [0.0, 1.0]]), (name, "tanh"), kernel).sum().backward()
    assert abs(a.grad.item()) < 1e-12
    torch.testing.assert_close(b.grad, 1 - torch.tanh(b.detach()).square())


@pytest.mark.parametrize("shape", [(1, 1, 7), (7, 1), (2, 5, 6), (6,), (10, 7)])
def test_coefficients_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        UserError, match=r"do not fit 7 activations of a tensor \(2, 5, 33\); give \(7,\) or \(2, 5, 7\)"
    ):
        mix(torch.ones(2, 5, 33), torch.ones(shape), SEVEN)


@KERNELS
def test_a_coefficient_of_zero_still_gets_its_gradient(kernel: Kernel) -> None:
    u, c = randn(4, 5, seed=1), torch.zeros(4, 7, dtype=torch.float64, requires_grad=True)
    mix(u, c, SEVEN, kernel=kernel).sum().backward()
    assert_close(c.grad, numpy_reference.stack(numpy_reference.FUNCTION, SEVEN, u.numpy()).sum(-1), 1e-12)
    a, square = leaf(4, 5, seed=2), torch.zeros(4, 3, 3, dtype=torch.float64, requires_grad=True)
    mix_pairs(a, u, square, PAIRS, kernel).sum().backward()
    expected = numpy_reference.mix_pairs_gradient(
        a.detach().numpy(), u.numpy(), np.zeros((4, 3, 3)), PAIRS, np.ones((4, 5))
    )[2]
    assert_close(square.grad, expected, 1e-12)
    assert not a.grad.any()


# --- memory, precision, limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_only_the_inputs_are_saved_for_backward(dtype: torch.dtype) -> None:
    u, b = leaf(6, 64, seed=1, dtype=dtype), leaf(6, 64, seed=2, dtype=dtype)
    c, square = leaf(6, 7, seed=3, dtype=torch.float32), leaf(6, 3, 3, seed=4, dtype=torch.float32)
    with saved_tensors() as saved:
        mix(u, c, SEVEN)
    assert bytes_of(*saved) == bytes_of(u, c)
    assert {tensor.data_ptr() for tensor in saved} == {u.data_ptr(), c.data_ptr()}
    with saved_tensors() as saved:
        mix_pairs(u, b, square, PAIRS)
    assert bytes_of(*saved) == bytes_of(u, b, square)
    assert {tensor.data_ptr() for tensor in saved} == {u.data_ptr(), b.data_ptr(), square.data_ptr()}
    with saved_tensors() as saved:  # what the count would be: the yardstick keeps K activated tensors
        mix(u, c, SEVEN, kernel="reference")
    assert bytes_of(*saved) > 7 * bytes_of(u)


def test_autocast_does_not_reach_into_the_kernels() -> None:
    """bf16 sums inside would be 1e-3 off; also where backward runs inside the autocast region."""
    a, b, dy = (randn(6, 33, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    c, square = randn(6, 7, seed=4, dtype=torch.float32), randn(6, 3, 3, seed=5, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        leaves = [value.clone().requires_grad_() for value in (a, b, c, square)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = mix(leaves[0], leaves[2], SEVEN), mix_pairs(leaves[0], leaves[1], leaves[3], PAIRS)
            torch.autograd.backward(outputs, (dy, dy))
        results.append((*outputs, *(value.grad for value in leaves)))
    for plain, under_autocast in zip(*results, strict=True):
        torch.testing.assert_close(under_autocast, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("zeros", [False, True], ids=["all in use", "zeros among the coefficients"])
def test_second_derivatives(zeros: bool) -> None:
    a, b, c, square = leaf(2, 3, seed=1), leaf(2, 3, seed=2), leaf(2, 7, seed=3), leaf(2, 3, 3, seed=4)
    if zeros:
        with torch.no_grad():
            c[:, 1:], square[:, 1], square[:, :, 0] = 0, 0, 0
    assert torch.autograd.gradgradcheck(lambda u, c: mix(u, c, SEVEN), (a, c))
    assert torch.autograd.gradgradcheck(lambda a, b, c: mix_pairs(a, b, c, PAIRS), (a, b, square))


@KERNELS
def test_a_pair_of_coefficient_zero_hides_an_overflow_from_gradients_too(kernel: Kernel) -> None:
    a, b = torch.full((1, 1), 1e30, requires_grad=True), torch.full((1, 1), 2.0, requires_grad=True)
    c = torch.tensor([[0.0, 0.0], [0.0, 1.0]], requires_grad=True)
    mix_pairs(a, b, c, ("relu2", "tanh"), kernel).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert c.grad is not None
    assert a.grad.item() == pytest.approx(0.0, abs=1e-15)
    assert b.grad.item() == pytest.approx(1 / np.cosh(2.0) ** 2, rel=1e-5)
    assert c.grad[1].tolist() == pytest.approx([4.0, np.tanh(2.0)], rel=1e-5)
