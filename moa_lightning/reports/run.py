"""The report of one run, also while it goes on: metrics, curves, pictures, samples, config, where it ran."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .. import environment
from ..errors import UserError
from ..experiments.plots import AXIS_LABELS, svg
from ..experiments.progress import duration
from ..run_folder import CONFIG, RESULT, TEST, read_json
from .content import Block, Code, Picture, Report, Section, Table, Text
from .densities import densities
from .files import read_text, reading
from .mixes import run_mixes

COUNTERS = ("step", "samples", "tokens", "flops", "seconds")
LOSS = "train/loss"
PANELS = 3  # in a row
MIXES = "mixing-"  # begins the names of pictures and samples about mixes
PICTURES = 6  # shown of a run, the latest of each kind
HOW_TO_READ = {
    "reconstruction": "what the encoder sees, what the decoder makes of it, the image",
    "attention": "the images, and where the last block looks, a row a head, the most in white",
    "patches": "the images, and their patches by the first three principal components: like colours are like features",
    "neighbours": "an image and its nearest training images, framed in green where the class is the same, else orange",
}


def run_report(folder: Path) -> Report:
    """The report of a run's folder.

    Raises:
        UserError: it holds no run.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"'{folder}' holds neither a run ({CONFIG}) nor a grid")
    rows = _rows(folder / "metrics.csv")
    about, state = _about(folder)
    last = f", at step {int(rows[-1]['step']):,}" if rows else ""
    sections = [
        Section("Metrics", [*_metrics(folder, rows)]),
        Section("Curves", [*_curves(rows)]),
        Section("What it shows", [*pictures(folder), *samples(folder)]),
        Section("What pruning left", densities({folder.name: [folder]}, "densities")),
        Section("What the mix learned", run_mixes(folder, pictures(folder, MIXES), samples(folder, MIXES))),
        Section("Configuration", [Code(CONFIG, read_text(folder / CONFIG))]),
        Section("Where it ran", provenance([folder])),
    ]
    return Report(folder.name, f"{about}{state}{last}.", [section for section in sections if section.blocks])


def _about(folder: Path) -> tuple[str, str]:
    """What was trained, and whether to the end."""
    result = read_json(folder / RESULT)
    if result is None:
        return "A run, ", "not finished"
    with reading(folder / RESULT):
        about = f"{result['task']}, {result['parameters']:,} trained parameters; "
        return about, f"finished after {duration(result['seconds'])} of training"


def pictures(folder: Path, about: str = "") -> list[Picture]:
    """The latest picture of each kind: reconstructions, attention; about MIXES the curves of mixes."""
    latest = _latest(folder, "pictures/*.png", about)
    return [
        Picture(path.stem, path.read_bytes(), "png", caption(name, path))
        for name, path in list(latest.items())[:PICTURES]
    ]


def caption(name: str, path: Path) -> str:
    """What a picture is and, where the name is a known one, how to read it."""
    text = f"{name.replace('-', ' ')} at step {_step(path):,}"
    return f"{text}: {HOW_TO_READ[name]}" if name in HOW_TO_READ else text


def samples(folder: Path, about: str = "") -> list[Code]:
    """The latest text of each kind, about MIXES or about everything else."""
    latest = _latest(folder, "samples/*.txt", about)
    return [Code(f"{name} at step {_step(path):,}", read_text(path), folded=False) for name, path in latest.items()]


def _latest(folder: Path, pattern: str, about: str) -> dict[str, Path]:
    """The last file of each kind that a run has written; a user's own files in between have no step."""
    latest: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern), key=lambda path: (_step(path) or 0, path.name)):
        name = path.stem.rpartition("-step")[0]
        if _step(path) is not None and name.startswith(MIXES) == (about == MIXES):
            latest[name] = path
    return dict(sorted(latest.items()))


def provenance(folders: list[Path]) -> list[Block]:
    """Code, machine, versions, data and command of runs, each different one once."""
    rows: dict[tuple[str, ...], int] = {}
    commands = []
    for folder in folders:
        with reading(folder / environment.FILE):
            for entry in environment.read(folder):
                row = _start(entry)
                rows[row] = rows.get(row, 0) + 1
                commands.append(" ".join(entry.get("command") or []))
    if not rows:
        return [Text("No record of it: the run was made before such records were kept.")]
    table = Table(
        ("commit", "device", "versions", "data", "starts"),
        [(*row, str(count)) for row, count in rows.items()],
        note='"+" after a commit: files differed from it.',
    )
    return [table, *([Code("command", commands[-1])] if len(folders) == 1 else [])]


def _start(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Where and with what a run was started once."""
    data, packages = entry.get("data") or {}, entry.get("packages") or {}
    return (
        str(entry.get("commit") or "unknown")[:12] + ("+" if str(entry.get("commit")).endswith("+") else ""),
        f"{entry.get('device')}; {entry.get('run')}",
        f"Python {entry.get('python')}, " + ", ".join(f"{name} {packages[name]}" for name in packages),
        f"{data.get('data')} {data.get('source', '')}, sha256 {str(data.get('sha256', 'unknown'))[:12]}",
    )


def _metrics(folder: Path, rows: list[dict[str, str]]) -> list[Block]:
    """The last value of every metric, and what the test said."""
    last = {name: row[name] for row in rows for name in row if row[name]}
    cells = [(name, f"{float(value):.5g}") for name, value in last.items()]
    tested = read_json(folder / TEST)
    if tested is not None:
        with reading(folder / TEST):
            tests = tested["metrics"].items()
            cells += [(name, "not finite" if value is None else f"{value:.5g}") for name, value in tests]
    return [Table(("metric", "last value"), cells)] if cells else [Text("Nothing was measured yet.")]


def _curves(rows: list[dict[str, str]]) -> list[Block]:
    """Every logged metric against steps, train/ and val/ of one name in one panel; then those that a comparison may be
    about against everything else that the run has counted."""
    names = [name for name in (rows[0] if rows else {}) if name not in COUNTERS]
    panels = list(dict.fromkeys(_panel(name) for name in names))
    if not panels:
        return []
    height = -(-len(panels) // PANELS)
    figure = Figure(figsize=(12, 2.7 * height), layout="constrained")
    all_axes = np.atleast_1d(figure.subplots(height, PANELS)).ravel()
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(all_axes, panels, strict=False):
        _draw(axes, rows, [name for name in names if _panel(name) == panel], "step")
        axes.set_title(panel, fontsize=10)
    blocks: list[Block] = [Picture("curves", svg(figure), "svg", "All logged metrics against optimiser steps")]
    return [*blocks, *_further_curves(rows, [name for name in names if name == LOSS or name.startswith("val/")])]


def _further_curves(rows: list[dict[str, str]], names: list[str]) -> list[Block]:
    """A row of panels a metric, a column for each of samples or tokens, FLOPs and seconds that was counted."""
    counted = [name for name in COUNTERS[1:] if len({row[name] for row in rows if row.get(name)}) > 1]
    counted = [name for name in counted if name != "samples" or "tokens" not in counted]
    panels = list(dict.fromkeys(_panel(name) for name in names))
    if not counted or not panels:
        return []
    figure = Figure(figsize=(4 * len(counted), 2.7 * len(panels)), layout="constrained")
    for line, panel in zip(
        figure.subplots(len(panels), len(counted), squeeze=False, sharey="row"), panels, strict=True
    ):
        for axes, axis in zip(line, counted, strict=True):
            _draw(axes, rows, [name for name in names if _panel(name) == panel], axis)
            axes.set_xlabel(AXIS_LABELS[axis], fontsize=9)
        line[0].set_title(panel, fontsize=10)
    labels = [AXIS_LABELS[axis] for axis in counted]
    listed = " and ".join([*([", ".join(labels[:-1])] if labels[1:] else []), labels[-1]])
    caption = f"Losses and validation metrics against {listed} of training"
    return [Picture("curves-on-other-axes", svg(figure), "svg", caption)]


def _draw(axes: Axes, rows: list[dict[str, str]], names: list[str], axis: str) -> None:
    for name in names:
        points = [(float(row[axis]), float(row[name])) for row in rows if row.get(name) and row.get(axis)]
        marker = "." if len(points) < 40 else ""
        axes.plot(
            [x for x, _ in points], [y for _, y in points], marker=marker, linewidth=1.2, label=name.partition("/")[0]
        )
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    if len(axes.get_lines()) > 1:
        axes.legend(frameon=False, fontsize=8)


def _panel(name: str) -> str:
    group, _, rest = name.partition("/")
    return rest if group in ("train", "val") else name


def _rows(path: Path) -> list[dict[str, str]]:
    """Whole rows: a run under way may just be writing one."""
    if not path.is_file():
        return []
    with reading(path):
        rows = list(csv.DictReader(read_text(path).splitlines()))
        whole = [row for row in rows if row.get("step") and None not in row.values()]
        for row in whole:
            for cell in filter(None, row.values()):
                float(cell)
        return whole


def _step(path: Path) -> int | None:
    """The step in the name of a picture or a sample, None where it has none."""
    found = re.search(r"-step([0-9]+)$", path.stem)
    return None if found is None else int(found[1])
