"""Density of each layer of pruned runs: the share of its weights that stay."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from ..experiments.plots import COLOURS, svg
from ..run_folder import PRUNING, read_json
from .content import Block, Picture, Table, Text
from .files import reading


def densities(folders: Mapping[str, Sequence[Path]], name: str) -> list[Block]:
    """A plot and a table, a column a variant; nothing where no run is pruned.

    Args:
        folders: variant -> the folders of its runs.
        name: of the picture's file.
    """
    found = {variant: mean for variant, runs in folders.items() if (mean := _mean_density(runs))}
    if not found:
        return []
    layers = list(dict.fromkeys(layer for mean in found.values() for layer in mean))
    rows = [[layer, *(f"{mean[layer]:.3f}" if layer in mean else "" for mean in found.values())] for layer in layers]
    plot = Picture(name, svg(_figure(found, layers)), "svg", "share of each layer's weights that stay")
    title = Text("Density of the layers that are pruned, mean over runs.")
    return [title, plot, Table(("layer", *found), rows)]


def _mean_density(runs: Sequence[Path]) -> dict[str, float]:
    """layer -> density, mean over the runs that are pruned."""
    values: dict[str, list[float]] = {}
    for path in (run / PRUNING for run in runs):
        raw = read_json(path)
        if raw is not None:
            with reading(path):
                for layer, density in raw["density"].items():
                    values.setdefault(layer.removeprefix("net.").removesuffix(".weight"), []).append(float(density))
    return {layer: fmean(each) for layer, each in values.items()}


def _figure(found: Mapping[str, Mapping[str, float]], layers: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7.5, 0.2 * len(layers) + 1.0), layout="constrained")
    axes = figure.subplots()
    for number, (variant, mean) in enumerate(found.items()):
        points = [(mean[layer], place) for place, layer in enumerate(layers) if layer in mean]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.0, label=variant)
    axes.set_yticks(range(len(layers)), layers, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("density")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    figure.legend(loc="outside right center", frameon=False)
    return figure
