"""Where and with what a run was made, so that its figures can be judged and repeated: `environment.json` in its folder.

One entry for each time the run was started: a run may go on elsewhere.
"""

import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .callbacks.files import write_atomically

FILE = "environment.json"
PACKAGES = ("moa-lightning", "torch", "lightning", "timm", "torchvision", "torchmetrics", "webdataset", "numpy")


def commit() -> str | None:
    """The commit of the code in use, with "+" where files differ from it; None where it is not a repository's."""
    folder = Path(__file__).resolve().parent
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def describe(device: torch.device) -> dict[str, Any]:
    """Code, versions, machine and time of a start."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a folder of sources
            continue
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": versions,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "command": ["moa", *sys.argv[1:]],
    }


def record(folder: Path, entry: dict[str, Any], goes_on: bool) -> None:
    """Write an entry into the run's folder, after those of earlier starts where the run goes on."""
    path = folder / FILE
    entries = read(folder) if goes_on else []
    write_atomically(path, json.dumps([*entries, entry], indent=1, default=str) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run, none where it has no such file or a damaged one."""
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return entries if isinstance(entries, list) else []
