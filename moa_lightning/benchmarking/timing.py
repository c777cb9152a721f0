"""Times variants against each other: in turn in one process, so that other load on the machine hits all of them.

A ratio is the median over rounds of a variant's time by the baseline's in the same round, not the ratio of two medians:
on a busy machine whole rounds are slow, and that cancels. The quartiles of these ratios are kept beside it, so that a
reader can see how far to trust it.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

Calls = Mapping[str, Callable[[], Any]]
Seconds = dict[str, list[float]]
LEAST_ROUNDS = 3
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of glibc


@dataclass(frozen=True)
class Effort:
    """How long a group of variants is measured."""

    rounds: int
    """at most"""
    seconds: float
    """after which no further round begins, once there are LEAST_ROUNDS"""
    warm_up: int = 2
    """rounds before the counted ones"""


@dataclass
class Row:
    """One variant of a group: what it took, and against which baseline."""

    group: str
    variant: str
    ms: float
    """median over rounds, milliseconds"""
    of: str | None = None
    """the baseline, a variant of the same group"""
    ratio: float | None = None
    """median over rounds of this variant's time by the baseline's"""
    quartiles: tuple[float, float] | None = None
    """of the ratios"""
    rounds: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    """what else is known, by name"""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def alternate(calls: Calls, effort: Effort, device: torch.device, before: Callable[[], Any] = lambda: None) -> Seconds:
    """Seconds of each call, one after the other in every round; the device is waited for.

    Args:
        before: called before each of them and not timed, so that all find the caches alike.
    """
    seconds: Seconds = {name: [] for name in calls}
    begin = time.perf_counter()
    for round_ in range(-effort.warm_up, effort.rounds):
        if round_ == 0:
            begin = time.perf_counter()
        if round_ >= LEAST_ROUNDS and time.perf_counter() - begin > effort.seconds:
            break
        for name, call in calls.items():
            before()
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(group: str, seconds: Seconds, baselines: Mapping[str, str], repeats: int = 1) -> list[Row]:
    """One row a variant.

    Args:
        seconds: of each variant, round by round.
        baselines: variant -> baseline; a variant that is not in it has none.
        repeats: how often a call repeats what is measured.
    """
    found = []
    for name, times in seconds.items():
        row = Row(group, name, 1000 * statistics.median(times) / repeats, baselines.get(name), rounds=len(times))
        if row.of is not None:
            ratios = [a / b for a, b in zip(times, seconds[row.of], strict=True)]
            row.ratio = statistics.median(ratios)
            low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
            row.quartiles = (low, high)
        found.append(row)
    return found


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks for this process; whether it does (other C libraries have no such switch).

    By default it gives large freed blocks back to the system, and their next use faults every page in again, which on
    the CPU can cost more than an activation. Then what is timed is the kernel's page faults and not the operation.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
