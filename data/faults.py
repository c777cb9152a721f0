"""Faults in data: samples that cannot be read, and files that answer slowly.

A reader raises BadSample; what happens then is decided in one place, `base.Samples`. A slow file is only counted: to
skip what comes late would make the result of a run depend on the hour at which it ran.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from moa_lightning.errors import UserError

OnBadSample = Literal["raise", "skip"]
Fault = tuple[str, str]  # kind and file
BAD, SLOW = "bad", "slow"
SLOW_SECONDS = 5.0  # a read that takes longer is counted

# files that the sample being read has waited for; a process reads one sample at a time
_slow: list[str] = []


class BadSample(UserError):
    """A sample that cannot be read.

    Args:
        file: what it is counted under.
        message: a sentence naming file and sample.
    """

    def __init__(self, file: str, message: str) -> None:
        super().__init__(message)
        self.file = file


@contextmanager
def reading(file: str, name: Callable[[], str]) -> Iterator[None]:
    """Errors of the system become BadSample; a long wait is noted for `take_slow`.

    Args:
        file: the file that is read.
        name: what is read, for the message; asked only when there is an error.
    """
    started = time.monotonic()
    try:
        yield
    except OSError as error:
        raise BadSample(file, f"{name()} cannot be read ({error.strerror or error}): put the file back") from error
    finally:
        if time.monotonic() - started > SLOW_SECONDS:
            _slow.append(file)


def take_slow() -> list[Fault]:
    """The slow reads since the last call."""
    faults = [(SLOW, file) for file in _slow]
    _slow.clear()
    return faults
