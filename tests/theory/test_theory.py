"""Witnesses, fits, bounds and the command: exact where the theory says so, against independent figures elsewhere."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_lightning.activations import DICTIONARY, pointwise
from moa_lightning.cli import main
from moa_lightning.feedforward import FeedForward, FFNConfig
from moa_lightning.theory.fits import Effort, Inner, Samples, best_fit, join, padded, random_inner, residual, widened
from moa_lightning.theory.study import LA, STATEMENTS, derivative_bound, one_branch_bound, run_study, witness_errors
from moa_lightning.theory.witnesses import (
    LAMBDA,
    MODULATED,
    SATURATED,
    SQUARED,
    TWICE_BENT,
    Target,
    gated_fixed_witness,
    gated_la_witness,
    gated_moa_witness,
    la_witness,
    largest_error,
    moa_witness,
)
from tests.layers import randomise

QUICK = Effort(3, 80, 200)


def search(target, entries: tuple[str, ...], width: int, effort: Effort = QUICK, seed: int = 0):
    inner = random_inner(effort.starts, width, target.dim, entries, torch.Generator().manual_seed(seed))
    return best_fit(target, entries, inner, effort)


def test_one_unit_of_la_is_relu_plus_its_square() -> None:
    layer = la_witness()
    assert layer.hidden_dim == 1
    assert largest_error(layer, SQUARED) <= 1e-12
    x = torch.tensor([[-0.5], [0.25], [1.0]], dtype=torch.float64)
    assert layer(x)[:, 0].tolist() == pytest.approx([0.0, 0.3125, 2.0], abs=1e-15)


@pytest.mark.parametrize("gate", ["tanh", "sigmoid"])
def test_one_unit_of_moa_is_the_modulated_ridge(gate) -> None:
    layer = moa_witness(gate)
    assert layer.hidden_dim == 1
    assert largest_error(layer, MODULATED) <= 1e-12
    x = torch.tensor([[0.5, 0.5], [-0.5, 0.5], [0.5, -0.5]], dtype=torch.float64)
    half = math.tanh(LAMBDA / 2) / 2
    assert layer(x)[:, 0].tolist() == pytest.approx([half, -half, 0.0], abs=1e-15)


GATED = {
    "fixed": (gated_fixed_witness, SQUARED),
    "la one": (lambda: gated_la_witness("one"), SATURATED),
    "la both": (lambda: gated_la_witness("both"), MODULATED),
    "la pairs": (lambda: gated_la_witness("pairs"), MODULATED),
    **{
        f"moa {branches} {gate}": (
            lambda branches=branches, gate=gate: gated_moa_witness(branches, gate),
            MODULATED if branches == "one" else TWICE_BENT,
        )
        for branches in ("one", "both", "pairs")
        for gate in ("tanh", "sigmoid")
    },
}


@pytest.mark.parametrize("name", GATED)
def test_one_unit_of_a_gated_layer_is_its_function(name: str) -> None:
    """Gated layers have the functions that plain ones lack: no bound of plain layers is said of them."""
    build, target = GATED[name]
    layer = build()
    assert (layer.hidden_dim, layer.config.form, layer.config.mixing) == (1, "gated", name.split()[0])
    assert all(mix.gate is None for mix in layer.mixings().values()) or layer.config.mixing == "moa"
    assert largest_error(layer, target) <= 1e-12


def test_functions_of_gated_layers_by_hand() -> None:
    x = torch.tensor([[0.5, 0.5, 0.25], [-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]], dtype=torch.float64)
    eighth = math.tanh(LAMBDA / 2) / 8
    assert gated_moa_witness("both")(x)[:, 0].tolist() == pytest.approx([eighth, -2 * eighth, 0.0, 0.0], abs=1e-15)
    x = torch.tensor([[-0.5], [1.0]], dtype=torch.float64)
    expected = [-math.tanh(0.5), 1 + math.tanh(1.0)]
    assert gated_la_witness("one")(x)[:, 0].tolist() == pytest.approx(expected, abs=1e-15)


def gated_with_kinks_on_the_axes(branches: str, mixing: str = "la", units: int = 60) -> FeedForward:
    """Random layers on [-1, 1]³ (one branch: ²), a third of whose lines g = 0, and of u = 0, are x₂ = 0, a third of the
    others contain the x₁ axis."""
    dim = 2 if branches == "one" else 3
    layer = FeedForward(dim, FFNConfig(mixing, "gated", activation="relu", branches=branches), hidden_dim=units)
    randomise(layer.double())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter *= 3
        for projection in (layer.gate_proj, layer.up_proj):
            kind = torch.randint(3, (units,), generator=generator)
            projection.weight[kind < 2, 0] = 0.0
            projection.bias[kind < 2] = 0.0
            projection.weight[kind == 0, 2:] = 0.0
    return layer


def jumps_along_the_kink(layer: FeedForward, x1: torch.Tensor) -> torch.Tensor:
    """At points x₁ (N,): of ∂/∂x₂ across x₂ = 0 in two dimensions, of ∂²/∂x₂∂x₃ across x₂ = 0, x₃ = 0, in three."""
    dim, near, nearer = layer.dim, 1e-6, 1e-10
    signs = [(side,) for side in (-1, 1)] if dim == 2 else [(a, b) for a in (-1, 1) for b in (-1, 1)]
    total = torch.zeros_like(x1)
    for sign in signs:
        beside = [side * step for side, step in zip(sign, (nearer, near), strict=False)]
        point = torch.stack([x1, *(torch.full_like(x1, at) for at in beside)], dim=1).requires_grad_(True)
        slope = torch.autograd.grad(layer(point)[:, 0].sum(), point, create_graph=dim == 3)[0][:, 1]
        if dim == 3:
            slope = torch.autograd.grad(slope.sum(), point)[0][:, 2]
        total += math.prod(sign) * slope.detach()
    return total


@pytest.mark.parametrize("mixing", ["fixed", "la"])
def test_with_one_branch_mixed_the_jump_is_affine(mixing: str) -> None:
    """And so misses the modulated ridge's by twice the bound at least: docs/theory.md, 6."""
    x1 = torch.linspace(-1, 1, 401, dtype=torch.float64)[1:-1:3]
    jump = jumps_along_the_kink(gated_with_kinks_on_the_axes("one", mixing), x1)
    line = np.polynomial.Polynomial.fit(x1, jump, 1)
    assert float(jump.max() - jump.min()) > 0.1
    np.testing.assert_allclose(jump, line(x1.numpy()), atol=1e-4)


@pytest.mark.parametrize("branches", ["both", "pairs"])
def test_with_both_mixed_the_jump_of_the_mixed_derivative_is_constant(branches: str) -> None:
    """And so misses that of the modulated ridge times ReLU(x₃) by tanh(λ): docs/theory.md, 7."""
    x1 = torch.linspace(-1, 1, 401, dtype=torch.float64)[1:-1:3]
    jump = jumps_along_the_kink(gated_with_kinks_on_the_axes(branches), x1)
    assert abs(float(jump.mean())) > 0.1
    np.testing.assert_allclose(jump, jump.mean().expand_as(jump), atol=1e-3)
    own = jumps_along_the_kink(gated_moa_witness(branches), x1)
    np.testing.assert_allclose(own, torch.tanh(LAMBDA * x1), atol=1e-3)


def test_the_bound_of_one_branch_is_half_the_distance_from_the_affine_functions() -> None:
    """Against the best of many slopes; by symmetry the best affine function is a multiple of x."""
    x = np.linspace(0, 1, 4001)
    distance = min(float(np.abs(np.tanh(LAMBDA * x) - slope * x).max()) for slope in np.linspace(0.5, 2, 3001))
    assert one_branch_bound() == pytest.approx(distance / 2, abs=2e-4)
    assert one_branch_bound() <= distance / 2


def test_what_is_said_names_the_layers_that_it_holds_of() -> None:
    """LA on both branches is the modulated ridge, so no sentence may bound it for LA without saying which."""
    assert all(name.startswith(("plain ", "gated ")) for name in witness_errors())
    assert max(witness_errors().values()) <= 1e-12
    for mark, text in STATEMENTS:
        if mark == "S" or "bound" in text or "ridge" in text:
            assert "plain" in text.lower() or "gated" in text.lower() or "mean square" in text


def test_a_wrong_weight_of_a_witness_shows() -> None:
    layer = la_witness()
    with torch.no_grad():
        layer.up_mix.base[DICTIONARY.index("relu2")] += 1e-6
    assert largest_error(layer, SQUARED) == pytest.approx(1e-6, rel=0.02)


def test_grids_integrate_polynomials_and_come_close_to_the_kink() -> None:
    """∫ x₁² x₂⁴ over [-1, 1]², divided by its area, is 1/15."""
    points, weights = MODULATED.grid((400, 400))
    assert float(weights.sum()) == pytest.approx(1.0)
    integral = float((weights * points[:, 0] ** 2 * points[:, 1] ** 4).sum())
    assert integral == pytest.approx(1 / 15, rel=1e-4)
    assert points[:, 1].abs().min() < 1e-5


def test_the_last_layer_is_least_squares() -> None:
    """The residual of random inner weights against numpy's lstsq, and its gradient against differences."""
    samples = Samples.of(SQUARED)
    inner = random_inner(2, 3, 1, ("gelu",), torch.Generator().manual_seed(1))
    w, b = inner.w[1, :, 0].numpy(), inner.b[1].numpy()
    u = samples.x.numpy() * w + b
    phi = np.concatenate([torch.nn.functional.gelu(torch.from_numpy(u)).numpy(), np.ones((len(u), 1))], 1)
    roots = samples.roots.numpy()
    squares = np.linalg.lstsq(phi * roots[:, None], samples.y.numpy() * roots, rcond=None)[1][0]
    assert float(residual(inner, ("gelu",), samples)[1]) == pytest.approx(squares, rel=1e-6)
    moved = inner.b.clone().requires_grad_(True)
    residual(Inner(inner.w, moved, inner.alpha), ("gelu",), samples).sum().backward()
    step = torch.zeros_like(inner.b)
    step[1, 2] = 1e-5
    plus, minus = (residual(Inner(inner.w, inner.b + s * step, inner.alpha), ("gelu",), samples)[1] for s in (1, -1))
    assert float(moved.grad[1, 2]) == pytest.approx(float(plus - minus) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_a_fit_finds_a_function_of_its_own_family(name: str) -> None:
    own = Target("own", "", 2, lambda x: 1.5 * pointwise(name).function(x @ x.new_tensor([0.8, -1.1]) + 0.2) - 0.3)
    assert search(own, (name,), 1, Effort(6, 150, 200)).errors.function < 1e-6


def test_la_finds_the_function_that_no_fixed_activation_has() -> None:
    assert search(SQUARED, DICTIONARY, 1, Effort(6, 150, 200)).errors.function < 1e-7
    for name in DICTIONARY:
        assert search(SQUARED, (name,), 1).errors.function > 0.02


def test_neither_la_nor_fixed_has_the_modulated_ridge_in_one_unit() -> None:
    for entries in (DICTIONARY, ("gelu",), ("relu2",)):
        assert search(MODULATED, entries, 1).errors.function > 0.6


def test_more_units_are_no_worse_and_padding_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    one = search(MODULATED, ("gelu",), 2)
    wide = padded(one, 4)
    x = MODULATED.grid((9, 9))[0]
    assert torch.allclose(wide.layer()(x), one.layer()(x), atol=1e-14)
    start = join([widened(one.inner, 4, generator), random_inner(2, 4, 2, ("gelu",), generator)])
    assert best_fit(MODULATED, ("gelu",), start, QUICK).errors.function < one.errors.function


@pytest.fixture(scope="module")
def study():
    return run_study((1, 2, 4), ("relu", "relu2", "tanh"), QUICK)


def test_every_fit_respects_its_proved_bound(study) -> None:
    assert len(study.rows) == 2 * 4 * 3
    for row in study.rows:
        assert row.largest_derivative >= row.bound - 1e-2
        if row.member != LA or row.target == MODULATED.name:
            assert row.bound >= 0.25


def test_errors_never_rise_with_width_and_la_contains_the_fixed_ones(study) -> None:
    for target in (SQUARED, MODULATED):
        for member in study.members():
            errors = [row.function for row in study.of(target.name, member)]
            assert errors == sorted(errors, reverse=True)
        for index in range(3):
            fixed = [study.of(target.name, member)[index].function for member in ("relu", "relu2", "tanh")]
            assert study.of(target.name, LA)[index].function <= min(fixed)


def test_two_units_of_relu2_come_close_by_large_weights(study) -> None:
    """What docs/theory.md says of the mean square error: close in function, never in derivative."""
    two = study.of(SQUARED.name, "relu2")[1]
    assert two.function < 1e-3
    assert two.largest_weight > 10
    assert two.largest_derivative >= 0.49


def test_the_limit_behind_it_by_hand() -> None:
    """(1/(4δ) + 1/2)(x + δ)₊² + (1/2 - 1/(4δ))(x - δ)₊² tends to ReLU + ReLU²."""
    x = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    for delta in (1e-2, 1e-3):
        up, down = (x + delta).clamp(min=0) ** 2, (x - delta).clamp(min=0) ** 2
        near = (1 / (4 * delta) + 0.5) * up + (0.5 - 1 / (4 * delta)) * down
        assert float((near - SQUARED.function(x[:, None])).abs().max()) < delta


def test_bounds() -> None:
    assert derivative_bound(SQUARED, "relu", 8) == 1 / 8
    assert derivative_bound(SQUARED, "gelu", 8) == 0.5
    assert derivative_bound(SQUARED, LA, 1) == 0.0
    assert derivative_bound(MODULATED, LA, 64) == pytest.approx(math.tanh(LAMBDA) / 2)


def test_units_are_the_first_width_that_reaches_a_level(study) -> None:
    errors = {row.width: row.function for row in study.of(SQUARED.name, "relu")}
    assert study.units(SQUARED.name, "relu", errors[2]) == 2
    assert study.units(SQUARED.name, "relu", errors[4] / 2) is None


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys, monkeypatch, study) -> None:
    monkeypatch.setattr("moa_lightning.theory.command.run_study", lambda *arguments: study)
    assert main(["theory", "--quick", "--out", str(tmp_path / "deep" / "out")]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((tmp_path / "deep" / "out" / "theory.json").read_text())
    assert (tmp_path / "deep" / "out" / "theory.png").read_bytes().startswith(b"\x89PNG")
    assert len(stored["rows"]) == len(study.rows)
    assert stored["units_for_relative_error"]["squared"]["LA"]["0.1"] == 1
    for statement in stored["statements"]:
        assert statement["mark"] in ("P", "S", "O")
        assert f"[{statement['mark']}] {statement['text'][:40]}" in printed
    assert "largest error" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--widths", "3"], "unrecognized arguments: --widths 3"),
        (["--seed", "x"], "'x' is no seed"),
        (["--out", "FILE"], "cannot make this folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(arguments: list[str], said: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["theory", *(str(tmp_path / "file") if word == "FILE" else word for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_help(capsys) -> None:
    assert main(["theory", "--help"]) == 0
    assert "--quick" in capsys.readouterr().out
