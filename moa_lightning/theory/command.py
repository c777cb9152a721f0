"""The command `moa theory`: runs the study, prints its tables and statements, writes theory.json and theory.png."""

import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moa_lightning.callbacks.files import write_json
from moa_lightning.errors import UserError
from moa_lightning.help import THEORY
from moa_lightning.parser import Parser, seed

from .figure import draw
from .fits import Effort
from .study import LEVELS, STATEMENTS, Study, run_study
from .witnesses import TARGETS, Target

QUICK_WIDTHS, QUICK_ACTIVATIONS, QUICK_EFFORT = (1, 2, 4, 8), ("gelu", "relu", "relu2"), Effort(4, 80, 200)


def theory_command(argv: list[str]) -> int:
    """Run `moa theory`.

    Args:
        argv: the command line after `theory`.

    Raises:
        UserError: an unknown option, or a folder that cannot be made.
    """
    if "--help" in argv or "-h" in argv:
        print(THEORY, end="")
        return 0
    parser = Parser("moa theory", add_help=False)
    parser.add_argument("--out", type=Path, default=Path("runs/theory"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot make this folder ({error.strerror}); name another") from error
    # progress goes to stderr, so that the tables can be redirected; nothing of it stays
    with Console(stderr=True).status("moa theory") as status:

        def say(text: str) -> None:
            status.update(escape(text))

        if options.quick:
            study = run_study(QUICK_WIDTHS, QUICK_ACTIVATIONS, QUICK_EFFORT, options.seed, say)
        else:
            study = run_study(seed=options.seed, say=say)
    write_json(options.out / "theory.json", study.as_dict())
    draw(study, options.out / "theory.png")
    show(study, Console(highlight=False, soft_wrap=not sys.stdout.isatty()))
    print(f"{study.seconds:.0f} s; written: {options.out / 'theory.json'}, {options.out / 'theory.png'}")
    return 0


def show(study: Study, console: Console) -> None:
    """Witnesses, a table of errors and one of units for each target, and what is said by whom."""
    witnesses = _table("Witnesses: layers of one hidden unit, weights set by hand, float64", ("layer", "largest error"))
    for name, error in study.witnesses.items():
        witnesses.add_row(name, f"{error:.1e}")
    console.print(witnesses)
    for target in TARGETS:
        console.print(_errors(study, target))
        console.print(_units(study, target))
    for mark, text in STATEMENTS:
        console.print(f"[{mark}] {text}", markup=False)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    return table


def _errors(study: Study, target: Target) -> Table:
    table = _table(
        f"{target.formula}: relative rms error of plain layers by hidden units", ("", *map(str, study.widths))
    )
    for member in study.members():
        table.add_row(member, *(f"{row.function:.1e}" for row in study.of(target.name, member)))
    return table


def _units(study: Study, target: Target) -> Table:
    """Units for each level of error; and what the function's error does not show, of the widest fit."""
    last = study.widths[-1]
    exact = "LA" if target.dim == 1 else "MoA"
    table = _table(
        f"Units (of those tried) of plain layers for an error of ...: {exact} needs 1 for any.\n"
        f"Of the fit at {last}: derivative's error, rms and largest, with its lower bound; largest weight",
        ("", *(f"{level:g}" for level in LEVELS), "rms", "largest", "bound", "weight"),
    )
    for member in study.members():
        counts = (study.units(target.name, member, level) for level in LEVELS)
        end = study.of(target.name, member)[-1]
        table.add_row(
            member,
            *(f"> {last}" if count is None else str(count) for count in counts),
            f"{end.derivative:.1e}",
            f"{end.largest_derivative:.2g}",
            f"{end.bound:.2g}",
            f"{end.largest_weight:.0e}",
        )
    return table
