"""`moa report RUN_OR_GRID`: one page about a run or a grid, as HTML and as Markdown."""

from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..parser import Parser
from .content import Report

PAGE = "report"


def report_command(argv: list[str]) -> int:
    """The command; returns its exit status.

    Raises:
        UserError: for a mistake in the options, or a folder that holds nothing to report on.
    """
    parser = Parser(
        "moa report", description="Write report.html and report.md about a run or a grid, finished or under way."
    )
    parser.add_argument("what", metavar="RUN_OR_GRID", help="the folder of a run, or a grid's folder or file")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the report, instead of that of the run")
    parser.add_modules("where a size has to be measured")
    options = parser.parse_args(argv)
    report, folder = make_report(Path(options.what), options.modules)
    folder = options.out or folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in write_report(report, folder):
        print(path)
    return 0


def make_report(what: Path, modules: Collection[str] = ()) -> tuple[Report, Path]:
    """The report of a run's folder, or of a grid's folder or file, and the folder where it goes.

    Args:
        modules: the user's own that may be imported, to measure nets whose size a budget needs and no run has left.

    Raises:
        UserError: it is neither, or no finished run of the grid was made with its present configuration.
    """
    from ..configs import resolve_config
    from ..experiments.grid_file import load_grid
    from ..experiments.runner import make_schedule
    from ..experiments.state import kept_file, kept_seeds
    from .grid import grid_report
    from .run import run_report

    file = kept_file(what) if what.is_dir() else resolve_config(str(what))
    if file is None:
        return run_report(what), what
    grid = load_grid(file, resolve_config)
    if what.is_dir():
        grid = replace(grid, out=what)
        grid = replace(grid, seeds=kept_seeds(what) or grid.seeds)
    elif not grid.out.is_dir():
        raise UserError(f"{grid.out} does not exist yet; run moa ablate {what} first")
    refused = sorted(grid.modules.difference(modules))
    schedule = make_schedule(grid, partial(_refuse, what, refused[0])) if refused else make_schedule(grid)
    return grid_report(schedule), grid.out


def _refuse(what: Path, module: str, arguments: list[str]) -> Any:
    raise UserError(
        f"{what}: to measure a net of this grid, '{module}' would be imported, which runs its code; if you trust it, "
        f"add --import {module}"
    )


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write both forms; returns their paths."""
    from . import html, markdown

    page, text = folder / f"{PAGE}.html", folder / f"{PAGE}.md"
    draft = folder / f".{PAGE}.html"
    draft.write_text(html.render(report), encoding="utf-8")
    draft.replace(page)
    markdown.write(report, text, folder / PAGE)
    return [page, text]
