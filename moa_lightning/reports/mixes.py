"""What the mixes of a run or of a grid's runs have learned: gates by layer and class of token, curves, examples."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from ..controls import MIXING
from ..experiments.statistics import compare
from ..experiments.table import interval
from ..run_folder import HELD, read_json
from .content import Block, Code, Picture, Table, Text
from .files import reading

ALL = "all tokens"
NOTE = (
    "Gate entropy on a held-out batch: 1 where gates have not decided, 0 where they are shut (softmax: where one entry "
    "is chosen). Foreground are patches brighter than their image; in natural images that need not be an object. "
    "Single coefficients are not identifiable (LeakyReLU is a sum of two others), so look at the curves."
)
EXPERTS = (
    " Routed experts: over the tokens that each was given, mixing.json has them one by one; they have neither classes "
    "nor examples, since their rows no longer stand in the tokens' places."
)


def run_mixes(folder: Path, pictures: Sequence[Picture], samples: Sequence[Code]) -> list[Block]:
    """The section of one run; none for a run without learned mixes.

    Args:
        pictures, samples: those of the run that are about mixes.
    """
    found = _read(folder)
    if found is None:
        return []
    labels = list(dict.fromkeys(label for layer in found.entropy.values() for label in layer))
    rows = [[name, *(_number(layer.get(label)) for label in labels)] for name, layer in found.entropy.items()]
    blocks: list[Block] = []
    if rows:
        title = Text(f"Gate entropy of each layer at step {found.step:,}.")
        blocks += [title, Table(("layer", *labels), rows, NOTE + EXPERTS * found.routed)]
    return [*blocks, *_held({folder.name: [folder]}), *pictures, *samples]


def grid_mixes(folders: Mapping[str, Sequence[Path]]) -> list[Block]:
    """Variants compared: gate entropy by class, averaged over layers and seeds, and what averaged gates cost.

    Args:
        folders: variant -> the folders of its finished runs.
    """
    entropy: dict[str, dict[str, list[float]]] = {}
    for variant, runs in folders.items():
        for layer in (layer for run in runs if (found := _read(run)) for layer in found.entropy.values()):
            for label, value in layer.items():
                entropy.setdefault(variant, {}).setdefault(label, []).append(value)
    labels = list(dict.fromkeys(label for found in entropy.values() for label in found))
    rows = [
        [variant, *(_number(fmean(found[label]) if label in found else None) for label in labels)]
        for variant, found in entropy.items()
    ]
    blocks: list[Block] = []
    if rows:
        blocks += [Text("Gate entropy, mean over layers and seeds."), Table(("variant", *labels), rows, NOTE)]
    return [*blocks, *_held(folders)]


def _held(folders: Mapping[str, Sequence[Path]]) -> list[Block]:
    """Trained against gates held at their mean, where `moa validate --freeze_gates` was asked."""
    rows = []
    for variant, runs in folders.items():
        results = [result for run in runs if (result := _read_held(run)) is not None]
        for metric in results[0]["trained"] if results else ():
            trained, held = (
                dict(enumerate(each[kind].get(metric, math.nan) for each in results)) for kind in ("trained", "held")
            )
            means = [f"{fmean(values.values()):.5g}" for values in (trained, held)]
            rows.append([variant, metric, *means, interval(compare(held, trained, "min")), str(len(results))])
    if not rows:
        return []
    note = (
        "Held: each mix replaced by its mean over training tokens (MoA becomes LA), nothing trained after it. "
        "Difference: over the runs, with its 95 % t interval."
    )
    return [Table(("run", "metric", "trained", "gates held", "difference", "runs"), rows, note)]


class _Mixing(NamedTuple):
    """Gates of a run's layers."""

    step: int
    entropy: dict[str, dict[str, float]]
    """layer -> class of tokens, the first ALL -> entropy; layers without gates are left out"""
    routed: bool
    """some belong to experts"""


def _read(folder: Path) -> _Mixing | None:
    """What a run's mixing.json says, None where it has none."""
    raw = read_json(folder / MIXING)
    if raw is None:
        return None
    with reading(folder / MIXING):
        layers: Mapping[str, Any] = raw["layers"]
        entropy = {
            name: {
                label: float(value)
                for label, value in {ALL: layer["entropy"], **layer["entropy_by_class"]}.items()
                if value is not None
            }
            for name, layer in layers.items()
            if layer["entropy"] is not None
        }
        return _Mixing(int(raw["step"]), entropy, any("experts" in layer for layer in layers.values()))


def _read_held(folder: Path) -> dict[str, dict[str, float]] | None:
    """ "trained" and "held" -> metric -> value, None where the gates were not held."""
    raw = read_json(folder / HELD)
    if raw is None:
        return None
    with reading(folder / HELD):
        return {
            kind: {metric: math.nan if value is None else float(value) for metric, value in raw[kind].items()}
            for kind in ("trained", "held")
        }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
