"""Files of runs, which may be damaged, of another version or the user's own: one sentence that names the file."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Around what reads a file and uses what is in it.

    Raises:
        UserError: the file cannot be read, or does not hold what was looked for.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, csv.Error, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged or not from moa ({error!r}): repair it, or move it away and report again"
        ) from error


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8.

    Raises:
        UserError: it cannot be read, or is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}): save it as UTF-8, or move it away") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): move it away and report again") from error
