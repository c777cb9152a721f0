"""The picture of `moa theory`: errors of plain layers against their hidden units, a column for each target function.

Above the relative error of the function, below that of its derivative. A witness of one unit has no place on a
logarithmic axis: an arrow at one unit stands for it. Colours are Okabe and Ito's.
"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from moa_lightning.experiments.plots import COLOURS

from .study import EXACT, LA, Study
from .witnesses import MODULATED, SQUARED, TARGETS, Target

LABELS = {"function": "error of the function (rms, relative)", "derivative": "error of the derivative (rms, relative)"}
ARROWS = {SQUARED: "LA: exact\nwith one unit", MODULATED: "MoA: exact\nwith one unit"}
DOTS_PER_INCH = 150


def draw(study: Study, path: Path) -> None:
    """Write the picture as PNG."""
    figure = Figure(figsize=(9.6, 7.2), dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(2, len(TARGETS), sharex=True, squeeze=False)
    for column, target in enumerate(TARGETS):
        for row, field in enumerate(LABELS):
            _panel(panels[row][column], study, target, field)
        panels[0][column].set_title(f"{target.formula} on [-1, 1]{'²' if target.dim == 2 else ''}", fontsize=11)
        panels[1][column].set_xlabel("hidden units")
    for row, label in enumerate(LABELS.values()):
        panels[row][0].set_ylabel(label)
    lines, names = panels[0][1].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right center", frameon=False)
    figure.suptitle(
        "Best fits found of plain layers, with fixed activations and with LA; the witnesses are exact",
        x=0.01,
        ha="left",
    )
    FigureCanvasAgg(figure).print_png(path)


def _panel(axes: Axes, study: Study, target: Target, field: str) -> None:
    for index, member in enumerate(study.members()):
        found = [(row.width, getattr(row, field)) for row in study.of(target.name, member)]
        if not all(error > EXACT for _, error in found):
            continue  # exact: the arrow says so
        mix = member == LA
        colour = COLOURS[0] if mix else COLOURS[1 + index % (len(COLOURS) - 1)]
        axes.plot(*zip(*found, strict=True), color=colour, marker="o", markersize=3.5, linewidth=2 if mix else 1.2,
                  linestyle="--" if mix else "-", label=member)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(study.widths, [str(width) for width in study.widths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.annotate(
        ARROWS[target],
        xy=(0.045, 0.0),
        xytext=(0.03, 0.2),
        xycoords="axes fraction",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        arrowprops={"arrowstyle": "->"},
    )
