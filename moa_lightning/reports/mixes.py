"""What the mixes of a run or of a grid's runs have learned: gates by layer and class of token, curves, examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..controls import MIXING
from ..experiments.statistics import compare
from ..experiments.table import interval
from ..run_folder import HELD, read_json
from .content import Block, Code, Picture, Table, Text

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
    found = read_json(folder / MIXING)
    if found is None:
        return []
    layers: Mapping[str, Any] = found["layers"]
    classes = list(dict.fromkeys(name for layer in layers.values() for name in layer["entropy_by_class"]))
    rows = [
        [name, _number(layer["entropy"]), *(_number(layer["entropy_by_class"].get(label)) for label in classes)]
        for name, layer in layers.items()
        if layer["entropy"] is not None
    ]
    blocks: list[Block] = []
    if rows:
        title = Text(f"Gate entropy of each layer at step {found['step']:,}.")
        routed = any("experts" in layer for layer in layers.values())
        blocks += [title, Table(("layer", "all tokens", *classes), rows, NOTE + EXPERTS * routed)]
    return [*blocks, *_held({folder.name: [folder]}), *pictures, *samples]


def grid_mixes(folders: Mapping[str, Sequence[Path]]) -> list[Block]:
    """Variants compared: gate entropy by class, averaged over layers and seeds, and what averaged gates cost.

    Args:
        folders: variant -> the folders of its finished runs.
    """
    entropy: dict[str, dict[str, list[float]]] = {}
    for variant, runs in folders.items():
        for layer in (
            layer for run in runs for layer in ((read_json(run / MIXING) or {}).get("layers") or {}).values()
        ):
            if layer["entropy"] is None:
                continue
            for label, value in {"all tokens": layer["entropy"], **layer["entropy_by_class"]}.items():
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
        results = [result for run in runs if (result := read_json(run / HELD)) is not None]
        for metric in results[0]["trained"] if results else ():
            trained, held = (dict(enumerate(each[kind][metric] for each in results)) for kind in ("trained", "held"))
            means = [f"{fmean(values.values()):.5g}" for values in (trained, held)]
            rows.append([variant, metric, *means, interval(compare(held, trained, "min")), str(len(results))])
    if not rows:
        return []
    note = (
        "Held: each mix replaced by its mean over training tokens (MoA becomes LA), nothing trained after it. "
        "Difference: over the runs, with its 95 % t interval."
    )
    return [Table(("run", "metric", "trained", "gates held", "difference", "runs"), rows, note)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
