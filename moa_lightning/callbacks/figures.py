"""Drawing for TensorBoard: the curves and maps of a mix, PNG encoding, and where pictures go.

Figures are made with matplotlib's object interface (no global state, no display) and imported on first use. Colours are
Okabe and Ito's, which colour-blind readers tell apart. Widths stay at or below 1200 pixels, TensorBoard's column.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
DPI = 100
COLUMNS = 4
MAX_PANELS = 24
LEGEND_ENTRY = 2.0  # inches
HISTOGRAM_HEIGHT = 0.3  # of a panel


@dataclass(frozen=True)
class Picture:
    """An RGB picture as PNG."""

    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Curve:
    """One panel of the mixes' figure; all arrays (P,) over the points u."""

    name: str
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    start: np.ndarray
    histogram: np.ndarray | None = None
    """(P - 1,) shares of the pre-activations between the points"""


@dataclass(frozen=True)
class OverTime:
    """One panel of curves at several times, in their order; arrays (P,) over the points u."""

    name: str
    curves: dict[str, np.ndarray]
    """when -> curve; "start" and "now" are drawn as everywhere"""
    histogram: np.ndarray | None
    """(P - 1,) shares of the pre-activations between the points"""
    experts: np.ndarray | None = None
    """(E, P) the curve of each expert now, where the others are means over experts"""


@dataclass(frozen=True)
class PairMap:
    """One panel of the pairs' figure: mean coefficients (K, K), gate entries down, up entries across."""

    name: str
    mean: np.ndarray
    entries: tuple[str, ...]
    start: tuple[int, int] | None


def encode(pixels: np.ndarray) -> Picture:
    """uint8 pixels (H, W, 3) as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=3)
    return Picture(buffer.getvalue(), width=pixels.shape[1], height=pixels.shape[0])


def publish(picture: Picture, tag: str, step: int, writer: SummaryWriter | None, file: Path | None) -> None:
    """Give a picture to TensorBoard and to a file, each where there is one; encoded once for both."""
    if writer is not None:
        image = Summary.Image(
            height=picture.height, width=picture.width, colorspace=3, encoded_image_string=picture.png
        )
        writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture.png)


def keep_latest(folder: Path, prefix: str, count: int) -> None:
    """Delete all but the `count` files `<prefix>-step<number>.*` with the highest numbers."""
    files = sorted(folder.glob(f"{prefix}-step[0-9]*.*"), key=lambda path: int(path.stem.rpartition("-step")[2]))
    for path in files[:-count]:
        path.unlink()


def evenly(items: list[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def draw_curves(curves: list[Curve], u: np.ndarray, title: str) -> Picture:
    """Small multiples of sum_k c_k sigma_k(u), on common axes: mean, 10-90 % band of tokens, start."""
    curves = evenly(curves, MAX_PANELS)
    banded = any((curve.high > curve.low).any() for curve in curves)  # not for LA: all tokens share its curve
    figure, panels = _grid(len(curves), height=2.4, share=True)
    for axes, curve in zip(panels, curves, strict=True):
        axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
        axes.axvline(0, color="0.85", linewidth=0.8, zorder=0)
        _draw_histogram(axes, u, curve.histogram)
        if banded:
            axes.fill_between(u, curve.low, curve.high, color=BLUE, alpha=0.25, linewidth=0, label="10-90 % of tokens")
        axes.plot(u, curve.mean, color=BLUE, linewidth=1.8, label="mean over tokens" if banded else "now")
        axes.plot(u, curve.start, color=ORANGE, linewidth=1.3, dashes=(4, 2), label="at the start")
        axes.set_title(curve.name, fontsize=10, pad=3)
    panels[0].set_xlim(float(u[0]), float(u[-1]))
    panels[0].set_xticks(np.linspace(0.75 * u[0], 0.75 * u[-1], 3))
    panels[0].set_ylim(*_limits(curves))
    _legend(figure, panels, title)
    return _render(figure)


def draw_over_time(panels: list[OverTime], u: np.ndarray, title: str) -> Picture:
    """Small multiples of curves from pale (early) to full blue (now) on common axes, the start dashed."""
    from matplotlib.colors import to_rgb

    panels = evenly(panels, MAX_PANELS)
    figure, all_axes = _grid(len(panels), height=2.4, share=True)
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_histogram(axes, u, panel.histogram)
        for i, curve in enumerate(() if panel.experts is None else panel.experts):
            axes.plot(u, curve, color=GREEN, linewidth=0.8, alpha=0.8, label="" if i else "each expert now")
        between = [when for when in panel.curves if when not in ("start", "now")]
        for i, when in enumerate(between):
            paleness = 0.75 * (1 - (i + 1) / (len(between) + 1))
            colour = [paleness + (1 - paleness) * part for part in to_rgb(BLUE)]
            axes.plot(u, panel.curves[when], color=colour, linewidth=1.3, label=f"after {when}")
        axes.plot(u, panel.curves["now"], color=BLUE, linewidth=1.8, label="now")
        axes.plot(u, panel.curves["start"], color=ORANGE, linewidth=1.3, dashes=(4, 2), label="at the start")
        axes.set_title(panel.name, fontsize=10, pad=3)
    all_axes[0].set_xlim(float(u[0]), float(u[-1]))
    all_axes[0].set_xticks(np.linspace(0.75 * u[0], 0.75 * u[-1], 3))
    _legend(figure, all_axes, title)
    return _render(figure)


def draw_densities(densities: dict[str, float], title: str) -> Picture:
    """A bar for each layer, from the first at the top: the share of its weights that stay."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name.removeprefix("net.").removesuffix(".weight") for name in densities]
    figure = Figure(figsize=(7, 0.22 * len(names) + 0.9), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(range(len(names)), list(densities.values()), color=BLUE, height=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("density", fontsize=9)
    axes.grid(axis="x", color="0.9", zorder=0)
    axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=11)
    return _render(figure)


def draw_patches(rows: list[tuple[str, list[tuple[int, int]]]], images: np.ndarray, patch: int, title: str) -> Picture:
    """Rows of images, each with one patch framed.

    Args:
        rows: label of a row, and (image, patch counted row by row) from left to right.
        images: (B, 3, H, W) in [0, 1].
        patch: side of a patch in pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    columns, across = max(len(shown) for _, shown in rows), images.shape[-1] // patch
    figure = Figure(figsize=(1.1 * columns + 0.4, 1.4 * len(rows) + 0.5), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for part, (label, shown) in zip(figure.subfigures(len(rows), squeeze=False)[:, 0], rows, strict=True):
        part.suptitle(label, fontsize=9, x=0.01, ha="left")
        for axes, (image, number) in zip(part.subplots(1, columns, squeeze=False)[0], shown, strict=False):
            axes.imshow(images[image].transpose(1, 2, 0), interpolation="nearest")
            corner = (number % across * patch - 0.5, number // across * patch - 0.5)
            axes.add_patch(Rectangle(corner, patch, patch, fill=False, edgecolor=ORANGE, linewidth=1.8))
        for axes in part.axes:
            axes.set_axis_off()
    return _render(figure)


def _draw_histogram(axes: Any, u: np.ndarray, shares: np.ndarray | None) -> None:
    """Pre-activations as a light area at the foot of a panel, its highest point at three tenths of the height."""
    if shares is None or not shares.max() > 0:
        return
    heights, middles = HISTOGRAM_HEIGHT * shares / shares.max(), (u[1:] + u[:-1]) / 2
    style = {"color": "0.88", "linewidth": 0, "zorder": 0.5, "label": "pre-activations u"}
    axes.fill_between(middles, 0, heights, transform=axes.get_xaxis_transform(), **style)


def draw_pair_maps(maps: list[PairMap], title: str) -> Picture:
    """Small multiples of the mean coefficients of pairs, on one symmetric colour scale.

    The entry that was 1 at the start is framed, bears its value, and is left out of the scale: it would drown the rest.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    maps = evenly(maps, MAX_PANELS)
    figure, panels = _grid(len(maps), height=2.6, share=False)
    largest = max(float(np.abs(_without_start(panel)).max()) for panel in maps) or 1.0
    scale = ScalarMappable(Normalize(-largest, largest), "PuOr_r")
    for axes, panel in zip(panels, maps, strict=True):
        axes.imshow(panel.mean, norm=scale.norm, cmap=scale.cmap)
        if panel.start is not None:
            row, column = panel.start
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor="black"))
            axes.text(column, row, f"{panel.mean[row, column]:.2f}", ha="center", va="center", fontsize=8)
        ticks = range(len(panel.entries))
        axes.set_xticks(ticks, panel.entries, rotation=90, fontsize=8)
        axes.set_yticks(ticks, panel.entries, fontsize=8)
        axes.tick_params(length=0)
        axes.set_title(panel.name, fontsize=10, pad=3)
    figure.suptitle(title, fontsize=11)
    figure.colorbar(scale, ax=panels, shrink=0.8, label="mean coefficient")
    return _render(figure)


def _without_start(panel: PairMap) -> np.ndarray:
    mean = panel.mean.copy()
    if panel.start is not None:
        mean[panel.start] = 0.0
    return mean


def _grid(count: int, height: float, share: bool) -> "tuple[Figure, list[Any]]":
    """A figure with `count` panels, filled row by row, each 3 inches wide."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(3 * columns, 6), height * rows + 0.7), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _limits(curves: list[Curve]) -> tuple[float, float]:
    """The range of all panels, with a margin."""
    low = min(float(min(c.low.min(), c.start.min(), c.mean.min())) for c in curves)
    high = max(float(max(c.high.max(), c.start.max(), c.mean.max())) for c in curves)
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _legend(figure: "Figure", panels: list[Any], title: str) -> None:
    """The title, and each label that a panel has, once."""
    figure.suptitle(title, fontsize=11)
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    columns = min(len(found), int(figure.get_figwidth() // LEGEND_ENTRY))
    figure.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def _render(figure: "Figure") -> Picture:
    canvas: Any = figure.canvas
    canvas.draw()
    return encode(np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))
