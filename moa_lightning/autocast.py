"""Autocast, asked of any device: torch refuses to say anything of it for "meta", which computes shapes only."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast_on(device: str) -> bool:
    """Whether matrix products on this kind of device run in another dtype now."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off; where it is off, without the microseconds that takes. An exported program may come to run
    under it."""
    needed = autocast_on(device) or (torch.compiler.is_exporting() and device != "meta")
    return torch.autocast(device, enabled=False) if needed else nullcontext()
