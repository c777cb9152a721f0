"""What `moa bench` leaves: a JSON file for machines, and the same as a Markdown table a group."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from .timing import Row

# how a figure is written, and what it means
FIGURES = {
    "GB/s": ("{:.1f}", "bytes that the operation cannot avoid to move, over its time"),
    "of a copy": ("{:.0%}", "the same by what a copy of the activation moves in the same round"),
    "TFLOP/s": ("{:.3g}", "FLOPs of the matrix products over the time"),
    "of a product": ("{:.0%}", "the same by the rate of a measured matrix product"),
    "MFU": ("{:.1%}", "the same by the peak of the device's data sheet"),
    "TFLOP": ("{:.3g}", "FLOPs of the matrix products of a step: three times a forward pass"),
    "activation MB": ("{:,.0f}", "bytes that the feed-forward layers' activations cannot avoid to move in a step"),
    "of the step": ("{:.1%}", "the time of these bytes at the speed of a copy, by the step's time"),
    "peak MB": ("{:,.1f}", "memory at the worst moment of a step"),
    "memory ratio": ("{:.4f}", "the same by the baseline's"),
    "tokens/s": ("{:,.0f}", ""),
    "images/s": ("{:,.0f}", ""),
}


def markdown(about: dict[str, Any], measured: list[Row]) -> str:
    """The whole report."""
    return "\n\n".join((head(about), tables(measured), meanings(measured))).rstrip() + "\n"


def tables(measured: list[Row]) -> str:
    """A table a group."""
    groups = groupby(measured, key=lambda row: row.group)
    return "\n\n".join(f"**{group}**\n\n{_table(list(members))}" for group, members in groups)


def meanings(measured: list[Row]) -> str:
    """What the columns mean."""
    used = {name for row in measured for name in row.figures}
    found = [f"{name}: {text}" for name, (_, text) in FIGURES.items() if name in used and text]
    return "; ".join(found) + "." if found else ""


def head(about: dict[str, Any]) -> str:
    """Where and how it was measured, in a paragraph."""
    rates = []
    for dtype, copied in about["copy"].items():
        peak = about["peak"][dtype]
        sheet = "" if peak is None else f" (data sheet: {peak / 1e12:.4g})"
        product = about["product"][dtype] / 1e12
        rates.append(f"{dtype}: copies {copied / 1e9:.1f} GB/s, multiplies {product:.3g} TFLOP/s{sheet}")
    return (
        f"`moa bench` on {about['name']}, {about['threads']} CPU threads, torch {about['torch']}; {'; '.join(rates)}; "
        f"{about['malloc']}. Times are medians; a ratio is the median over rounds, its quartiles in brackets."
    )


def _table(found: list[Row]) -> str:
    names = [name for name in FIGURES if any(name in row.figures for row in found)]
    lines = [["variant", "ms", "ratio", *names], ["---", *["---:"] * (2 + len(names))]]
    for row in found:
        cells = [FIGURES[name][0].format(row.figures[name]) if name in row.figures else "" for name in names]
        lines.append([row.variant, f"{row.ms:.3g}" if row.ms < 10 else f"{row.ms:.1f}", _ratio(row), *cells])
    notes = [f"\n\n{row.variant}: {row.note}." for row in found if row.note]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "".join(notes)


def _ratio(row: Row) -> str:
    if row.ratio is None or row.quartiles is None:
        return ""
    low, high = row.quartiles
    return f"{row.ratio:.2f} × {row.of} ({low:.2f}–{high:.2f})"


def write(folder: Path, parts: list[str], about: dict[str, Any], measured: list[Row]) -> tuple[Path, Path]:
    """Write <folder>/<device>-<parts>.json and .md; the paths."""
    device = re.sub("[^a-z0-9]+", "-", str(about["name"]).lower()).strip("-")
    stem = folder / "-".join([device, *parts])
    as_json, as_text = stem.with_suffix(".json"), stem.with_suffix(".md")
    content = {"about": about, "rows": [row.as_dict() for row in measured]}
    as_json.write_text(json.dumps(content, indent=1) + "\n")
    as_text.write_text(markdown(about, measured))
    return as_json, as_text
