"""A report as Markdown, its pictures in files beside it."""

import re
from pathlib import Path

from .content import Block, Code, Picture, Report, Table, Text


def write(report: Report, path: Path, pictures: Path) -> None:
    """Write the text to `path` and the pictures into the folder `pictures`, which is linked to from it."""
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [f"# {_inline(report.title)}", "", _inline(report.lead)]
    for section in report.sections:
        lines += ["", f"## {_inline(section.title)}"]
        for block in section.blocks:
            lines += ["", _block(block, path.parent, pictures)]
    draft = path.with_name(f".{path.name}")
    draft.write_text("\n".join(lines) + "\n", encoding="utf-8")
    draft.replace(path)


def _block(block: Block, base: Path, pictures: Path) -> str:
    if isinstance(block, Text):
        return _inline(block.text)
    if isinstance(block, Table):
        lines = [block.headings, ["---"] * len(block.headings), *block.rows]
        table = "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)
        return f"{table}\n\n{_inline(block.note)}" if block.note else table
    if isinstance(block, Picture):
        file = pictures / f"{block.name}.{block.kind}"
        file.write_bytes(block.content)
        return f"![{_inline(block.caption)}]({file.relative_to(base).as_posix()})\n\n*{_inline(block.caption)}*"
    assert isinstance(block, Code)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", block.text)), default=0))
    return f"<details><summary>{_inline(block.title)}</summary>\n\n{fence}\n{block.text}\n{fence}\n\n</details>"


def _inline(text: str) -> str:
    """Text that Markdown leaves as it is: no markup, no HTML, one line."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
