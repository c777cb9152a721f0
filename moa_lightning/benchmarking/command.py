"""The command `moa bench`: what is measured, on which device, and where the results go."""

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..help import BENCH
from ..parser import Parser
from .decode import decode
from .layers import layer, op
from .loading import data
from .machine import ON_CPU, ON_GPU, QUICK, Machine, Setting, fast_dtypes, find_device, measure_machine
from .report import head, meanings, tables, write
from .steps import step
from .timing import Effort, Row, keep_freed_memory

PARTS: dict[str, Callable[[Setting, Machine], list[Row]]] = {
    "op": op,
    "layer": layer,
    "step": step,
    "decode": decode,
    "data": data,
}
FULL, SHORT = Effort(rounds=31, seconds=15.0), Effort(rounds=3, seconds=0.5, warm_up=1)


def bench_command(argv: list[str]) -> None:
    """Measure, print Markdown, and write both files where --out is given.

    Raises:
        UserError: unknown parts, options or devices, a folder that cannot be written.
    """
    if "-h" in argv or "--help" in argv:
        print(BENCH, end="")
        return
    given = _parser().parse_args(argv)
    unknown = [part for part in given.what if part not in PARTS]
    if unknown:
        raise UserError(f"'{unknown[0]}' is unknown; choose from {', '.join(PARTS)}")
    parts = [part for part in PARTS if part in given.what or not given.what]
    folder = None if given.out is None else _made(Path(given.out))
    keeps_memory = keep_freed_memory()
    setting = choose(given.device, given.quick)
    machine = measure_machine(setting)
    about = machine.about(setting, keeps_memory)
    print(head(about), flush=True)
    measured: list[Row] = []
    for part in parts:  # each is shown when it is done, as all of them take minutes
        found = PARTS[part](setting, machine)
        measured += found
        print(f"\n{tables(found)}", flush=True)
    print(f"\n{meanings(measured)}")
    if folder is not None:
        print("written:", *write(folder, parts, about, measured))


def _made(folder: Path) -> Path:
    """The folder, made where it is missing; a mistake in it should show before ten minutes of measurement."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out '{folder}' cannot be written: {error.strerror}") from error
    return folder


def choose(device_name: str | None, quick: bool) -> Setting:
    """Device, sizes, length and dtypes of the measurements."""
    device = find_device(device_name)
    sizes = QUICK if quick else ON_GPU if device.type == "cuda" else ON_CPU
    return Setting(device, sizes, SHORT if quick else FULL, fast_dtypes(device))


def _parser() -> Parser:
    parser = Parser("moa bench", add_help=False)
    parser.add_argument("what", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--device")
    return parser
