"""Witnesses, fits, bounds and the command: exact where the theory says so, against independent figures elsewhere."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moa_lightning.activations import DICTIONARY, pointwise
from moa_lightning.cli import main
from moa_lightning.theory.fits import Effort, Inner, Samples, best_fit, join, padded, random_inner, residual, widened
from moa_lightning.theory.study import LA, derivative_bound, run_study
from moa_lightning.theory.witnesses import LAMBDA, MODULATED, SQUARED, Target, la_witness, largest_error, moa_witness

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
