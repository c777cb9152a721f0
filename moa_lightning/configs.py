"""YAML fragments that compose: where they are found, how they merge, what `auto` resolves to.

All `-c` files of a command line are merged before the parser sees them, later ones winning key by key. So their order
matters only where two files say different things about the same key: an ffn fragment may come before the task file.
Lists of callbacks and loggers are joined instead of replaced.
"""

import platform
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError

JOINED_LISTS = ("callbacks", "logger")


def resolve_config(path: str) -> Path:
    """The file that a `-c` option means: looked for in the working folder, then in the copy inside the package.

    Raises:
        UserError: found in neither place.
    """
    here = Path(path)
    if here.is_file():
        return here
    package = Path(__file__).parent
    for root in (package, package.parent):  # a wheel carries configs/ inside the package, a checkout beside it
        candidate = root / path
        if candidate.is_file():
            return candidate
    raise UserError(f"config file '{path}' is neither in the working folder nor among the package's configs")


def load_config(path: str) -> dict[str, Any]:
    """The mapping that a YAML file holds; UserError names the file and line where it is not one."""
    file = resolve_config(path)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"config file '{path}'{where} is not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"config file '{path}' must hold keys and values, not {type(content).__name__}")
    return content


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one, key by key; `update` wins, lists of callbacks and loggers are joined."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge(old, value)
        elif key in JOINED_LISTS and isinstance(old, list) and isinstance(value, list):
            merged[key] = old + value
        else:
            merged[key] = value
    return merged


def compose(paths: list[str]) -> dict[str, Any]:
    """The merged content of config files."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged = merge(merged, load_config(path))
    return merged


def auto_precision() -> str:
    """bf16-mixed where the device multiplies bfloat16 matrices in hardware, otherwise 32-true."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if cpu_has_bf16() else "32-true"


def cpu_has_bf16() -> bool:
    """Whether this processor has bfloat16 dot-product or matrix instructions (x86: avx512_bf16 or amx; Arm: bf16)."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line.split()))
