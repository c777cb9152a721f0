"""The parts that a report is made of, whatever form it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isnan

from ..experiments.ratios import Ratio


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells of text; `marks` colours rows by a word in them (better, worse)."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """An image file's bytes with what it shows in words."""

    name: str
    """of its file in the Markdown form, without the suffix"""
    content: bytes
    kind: str
    """svg or png"""
    caption: str


@dataclass(frozen=True)
class Code:
    """Preformatted text that most readers skip: a config, a sample."""

    title: str
    text: str
    folded: bool = True


Block = Text | Table | Picture | Code


@dataclass
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """A page."""

    title: str
    lead: str
    sections: Sequence[Section]


def ratio_cell(ratio: Ratio) -> str:
    """A ratio in a table: 1.20 [1.10, 1.30], or a bound, or unknown."""
    return f"{ratio.ratio}" if isnan(ratio.low) else f"{ratio.ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
