"""The committed curves: where they lie, how far another curve may be from them, and how they are written anew.

`python -m tests.runs.golden --write` runs all fits and replaces golden.json: do so when a change of the numbers is
meant, and say in the commit why. Without `--write` it prints how far the fits are from the committed curves.
"""

import json
import platform
import sys
import tempfile
import warnings
from pathlib import Path

import lightning as L
import timm
import torch
import torchvision

from .fits import FITS, STRATEGIES
from .group import run_group
from .record import Record

FILE = Path(__file__).with_name("golden.json")
Curves = dict[str, dict[str, list[float]]]


def read() -> Curves:
    """{"<kind>/<fit>": {"loss": 50 values, "norm": 50 values}}."""
    return json.loads(FILE.read_text())["curves"]


def write(records: dict[str, dict[str, Record]]) -> None:
    """Store the curves of the first rank of every kind, six digits each, one line a curve."""
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, L, timm)}
    made_by = json.dumps({"python": platform.python_version(), "machine": platform.machine(), **versions})
    lines = [
        f'"{kind}/{name}": {{"loss": {_digits(records[kind][name].loss)}, "norm": {_digits(records[kind][name].norm)}}}'
        for kind in STRATEGIES
        for name in FITS
    ]
    FILE.write_text(f'{{"made_by": {made_by},\n"curves": {{\n' + ",\n".join(lines) + "\n}}\n")


def _digits(values: list[float]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def deviation(found: list[float], expected: list[float]) -> float:
    """The largest relative difference of two curves of equal length; infinite where one is not a number."""
    if len(found) != len(expected):
        return float("inf")
    pairs = zip(found, expected, strict=True)
    differences = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in pairs]
    return max(d if d == d else float("inf") for d in differences)


def assert_continues(resumed: Record, whole: Record, step: int) -> None:
    """A run resumed at a step is the rest of the whole run, to the bit."""
    for curve in ("ids", "loss", "norm", "clipped", "rates"):
        rest = getattr(whole, curve)[step:]
        assert rest, curve
        assert getattr(resumed, curve) == rest, curve
    for key, weight in whole.weights.items():
        assert torch.equal(resumed.weights[key], weight), key


def main(arguments: list[str]) -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        records = {kind: run_group(kind, Path(folder) / kind)[0] for kind in ("one", "ddp", "fsdp")}
    if "--write" in arguments:
        write(records)
        return
    for key, curve in read().items():
        kind, _, name = key.partition("/")
        found = vars(records[kind][name])
        print(f"{key:20}", *(f"{what} {deviation(found[what], curve[what]):.1e}" for what in ("loss", "norm")))


if __name__ == "__main__":
    main(sys.argv[1:])
