"""The parser of the commands that read their options by argparse: a mistake is one sentence, nothing is abbreviated."""

import argparse
from typing import Any, NoReturn

from .errors import UserError

MOST = 2**63 - 1  # as large as torch and NumPy take a seed


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError; its subparsers do so too.

    Args:
        prog: the command, such as "moa data".
        options: of ArgumentParser.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog=prog, **{"allow_abbrev": False, **options})

    def add_modules(self, why: str) -> None:
        """--import MODULE, may be repeated, of commands that read a grid; `why` it has to be allowed."""
        text = f"allow a module that the grid imports by an override, {why}"
        self.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help=text)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; {self.prog} --help lists the options")


def seed(text: str) -> int:
    """The type of an option that takes a seed: a whole number that random generators take."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value <= MOST:
        raise argparse.ArgumentTypeError(f"'{text}' is no seed, which is a whole number from 0 to {MOST}")
    return value
