"""What `moa theory` computes: the witnesses' errors, the best fits at growing width, and how many units buy an error.

The fits are of plain layers. Beside each stands a lower bound of its largest derivative error, proved in docs/theory.md
[O]; in that norm the separations of plain layers are quantitative at every width. In the norms of mean squares they are
not: with weights large enough, two units of ReLU² come as near to ReLU + ReLU² as one likes, which the largest weight
of each fit shows. Gated layers are separated by other functions; of these there are witnesses and proofs, no fits.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from moa_lightning.activations import DICTIONARY

from .fits import Effort, Fit, as_mix, best_fit, join, padded, random_inner, widened
from .witnesses import (
    LAMBDA,
    MODULATED,
    SATURATED,
    SQUARED,
    TARGETS,
    TWICE_BENT,
    Target,
    gated_fixed_witness,
    gated_la_witness,
    gated_moa_witness,
    la_witness,
    largest_error,
    moa_witness,
)

LA = "LA"
WIDTHS = (1, 2, 4, 8, 16, 32)
ACTIVATIONS = tuple(name for name in DICTIONARY if name != "identity")  # with identity the layer is linear
LEVELS = (0.1, 0.03, 0.01, 0.003)  # relative errors that units are counted for
EXACT = 1e-7  # a fit's relative error that counts as the function itself, beside a ridge of 1e-8
_PIECEWISE_LINEAR = ("relu", "leaky_relu")


def one_branch_bound() -> float:
    """A lower bound of the largest derivative error against the modulated ridge of any gated layer that mixes one
    branch, fixed or LA, at any width: half the distance of tanh(λ x) from the affine functions.

    For e = tanh(λ ·) - an affine function and any s in (0, 1], (e(s) - e(-s)) / 2 - s (e(1) - e(-1)) / 2 is
    tanh(λ s) - s tanh(λ), and at most (1 + s) max |e|. Every s proves a bound; the best of a grid is taken.
    """
    s = torch.linspace(0, 1, 1001, dtype=torch.float64)
    return float(((torch.tanh(LAMBDA * s) - s * math.tanh(LAMBDA)) / (1 + s)).max()) / 2


STATEMENTS = (
    ("P", "fixed ⊊ LA ⊊ MoA at every finite width: each family represents functions that the one before cannot."),
    ("S", "One hidden unit of plain LA is ReLU(x) + ReLU²(x); no plain layer with a fixed activation is it."),
    (
        "S",
        "One hidden unit of plain MoA (tanh gates in the proof) is tanh(λ x₁) · ReLU(x₂); plain LA has ridges of "
        "constant height.",
    ),
    (
        "O",
        "That both are about plain layers: gated, one hidden unit with a fixed ReLU and biases is the first function, "
        "and one of LA on both branches is the second.",
    ),
    (
        "O",
        f"λ = {LAMBDA:g}, the domain [-1, 1]^d, the norms and the search. Sigmoid gates serve as well, in the additive "
        "form of the coefficients.",
    ),
    (
        "O",
        "Plain layers, lower bounds of the largest derivative error, proved in docs/theory.md: 1/2 for ReLU + ReLU² "
        "with a fixed activation whose derivative is continuous, min(1/2, 1/width) with ReLU and LeakyReLU, and "
        f"tanh(λ)/2 = {math.tanh(LAMBDA) / 2:.3f} for the modulated ridge with any fixed activation or LA, at every "
        "width.",
    ),
    (
        "O",
        "Gated layers, proved there too: the same 1/2 and tanh(λ)/2 with a fixed activation whose derivative is "
        "continuous (SwiGLU, GEGLU); with any fixed activation, and with LA on one branch, "
        f"{one_branch_bound():.3f} for the modulated ridge; with LA on both branches, and pairs, tanh(λ)/4 = "
        f"{math.tanh(LAMBDA) / 4:.3f} for ∂²/∂x₂∂x₃ of the modulated ridge times ReLU(x₃); each at every width.",
    ),
    (
        "O",
        "So of gated layers fixed ⊊ LA, by ReLU + tanh (one branch; with a fixed ReLU or LeakyReLU no margin is given) "
        "or the modulated ridge (both, pairs), and LA ⊊ MoA, by the modulated ridge (one branch) or that times "
        "ReLU(x₃) (both, pairs).",
    ),
    (
        "O",
        "The mean square error has no such bound at growing weights: two units of ReLU² with weights of size 1/δ are "
        "within O(δ) of ReLU + ReLU². What a fit needs is units or large weights.",
    ),
    (
        "O",
        "Fits, all of plain layers, are evidence, not proof: each is an upper bound of the smallest error at its "
        "width.",
    ),
)


@dataclass(frozen=True)
class Row:
    """The best fit of one member at one width."""

    target: str
    member: str  # of plain layers: an activation's name, or LA
    width: int
    function: float  # errors as `fits.Errors` has them
    derivative: float
    largest_derivative: float
    bound: float  # of the largest derivative error, from below
    largest_weight: float


@dataclass(frozen=True)
class Study:
    """Everything that was computed."""

    witnesses: dict[str, float]  # name -> largest error
    rows: tuple[Row, ...]
    widths: tuple[int, ...]
    effort: Effort
    seed: int
    seconds: float

    def of(self, target: str, member: str) -> list[Row]:
        """A member's rows, by width."""
        return [row for row in self.rows if (row.target, row.member) == (target, member)]

    def members(self) -> list[str]:
        return list(dict.fromkeys(row.member for row in self.rows))

    def units(self, target: str, member: str, level: float) -> int | None:
        """The smallest width tried whose relative error is at most `level`; None where no width got there."""
        return next((row.width for row in self.of(target, member) if row.function <= level), None)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = {
            target.name: {
                member: {f"{level:g}": self.units(target.name, member, level) for level in LEVELS}
                for member in self.members()
            }
            for target in TARGETS
        }
        return {
            "targets": {target.name: target.formula for target in TARGETS},
            "lambda": LAMBDA,
            "statements": [{"mark": mark, "text": text} for mark, text in STATEMENTS],
            **asdict(self),
            "units_for_relative_error": counts,
        }


def witness_errors() -> dict[str, float]:
    """The largest error of each one-unit layer on its grid."""
    return {
        "plain LA: ReLU + ReLU²": largest_error(la_witness(), SQUARED),
        "plain MoA, tanh gate: modulated ridge": largest_error(moa_witness("tanh"), MODULATED),
        "plain MoA, sigmoid gate: modulated ridge": largest_error(moa_witness("sigmoid"), MODULATED),
        "gated ReLU (fixed), with biases: ReLU + ReLU²": largest_error(gated_fixed_witness(), SQUARED),
        "gated LA, one branch, with biases: ReLU + tanh": largest_error(gated_la_witness("one"), SATURATED),
        "gated LA, both branches: modulated ridge": largest_error(gated_la_witness("both"), MODULATED),
        "gated MoA, one branch, with biases: modulated ridge": largest_error(gated_moa_witness("one"), MODULATED),
        "gated MoA, both branches: modulated ridge · ReLU(x₃)": largest_error(gated_moa_witness("both"), TWICE_BENT),
    }


def derivative_bound(target: Target, member: str, width: int) -> float:
    """A lower bound of the largest derivative error of any plain layer of this member and width; docs/theory.md proves
    it. Of gated layers it does not hold: see `one_branch_bound`."""
    if target is MODULATED:
        return math.tanh(LAMBDA) / 2
    if member == LA:
        return 0.0
    return min(0.5, 1 / width) if member in _PIECEWISE_LINEAR else 0.5


def run_study(
    widths: Sequence[int] = WIDTHS,
    activations: Sequence[str] = ACTIVATIONS,
    effort: Effort | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Study:
    """Compute everything, on one thread.

    Args:
        widths: numbers of hidden units, rising.
        activations: the fixed members; LA mixes the whole dictionary.
        effort: None for the default one.
        seed: of the random starts.
        say: called before each piece of work.
    """
    effort = effort or Effort()
    began, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    try:
        rows: list[Row] = []
        for target in TARGETS:
            fixed = {}
            for member in activations:
                say(f"{target.formula}: {member}")
                fixed[member] = _fits(target, (member,), widths, {}, effort, seed)
            say(f"{target.formula}: LA")
            found = fixed | {LA: _fits(target, DICTIONARY, widths, fixed, effort, seed)}
            rows += [_row(target, member, fit) for member, fits in found.items() for fit in fits]
        errors = witness_errors()
    finally:
        torch.set_num_threads(threads)
    return Study(errors, tuple(rows), tuple(widths), effort, seed, time.perf_counter() - began)


def _fits(
    target: Target,
    entries: tuple[str, ...],
    widths: Sequence[int],
    contained: dict[str, list[Fit]],
    effort: Effort,
    seed: int,
) -> list[Fit]:
    """Best fits by width, none worse than a fit that it contains: the one of the width before, and those of fixed
    members in `contained`."""
    generator = torch.Generator().manual_seed(seed)
    fits: list[Fit] = []
    for index, width in enumerate(widths):
        starts = [random_inner(effort.starts_at(width), width, target.dim, entries, generator)]
        known = []
        if fits:
            starts.append(widened(fits[-1].inner, width, generator))
            known.append(padded(fits[-1], width))
        if contained:
            name, best = min(((n, f[index]) for n, f in contained.items()), key=lambda pair: pair[1].errors.function)
            mixed = as_mix(best.inner, name)
            starts.append(mixed)
            known.append(replace(best, entries=entries, inner=mixed))
        searched = best_fit(target, entries, join(starts), effort)
        fits.append(min([searched, *known], key=lambda fit: fit.errors.function))
    return fits


def _row(target: Target, member: str, fit: Fit) -> Row:
    errors, bound = fit.errors, derivative_bound(target, member, fit.width)
    return Row(
        target.name,
        member,
        fit.width,
        errors.function,
        errors.derivative,
        errors.largest_derivative,
        bound,
        fit.largest_weight,
    )
