"""YAML fragments that compose: where they are found, how they merge, which of them said what, what `auto` resolves to.

All `-c` files of a command line are merged before the parser sees them, later ones winning key by key. So their order
matters only where two files say different things about the same key: an ffn fragment may come before the task file.
Lists of callbacks, loggers and imports are joined instead of replaced. Which file a key came from is remembered, so
that an error can name it.
"""

import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import UserError

JOINED_LISTS = ("callbacks", "logger", "import")
CLASS_LEVELS = ("init_args", "dict_kwargs")  # levels of a config that options on the command line do not spell
MOST_BYTES, MOST_NODES = 1_000_000, 100_000  # of a config file, which has a few hundred values
ARM_AND_X86 = ("x86_64", "AMD64", "aarch64")


class Fragment(NamedTuple):
    """One config file."""

    name: str  # as the user wrote it
    content: dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number (YAML 1.1 wants 1.0e-3) and refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


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


def load_config(path: str) -> Fragment:
    """The mapping that a YAML file holds, empty for an empty file.

    Raises:
        UserError: no such file, no YAML (with the line), no mapping, a key that stands twice.
    """
    file = resolve_config(path)
    try:
        content = parse_yaml(file)
    except RecursionError as error:
        raise UserError(f"config file '{path}' is nested too deeply") from error
    except (yaml.YAMLError, ValueError, OverflowError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error)
        raise UserError(f"config file '{path}'{where} is not valid YAML: {what}") from error
    if content is None:
        return Fragment(path, {})
    if not isinstance(content, dict):
        raise UserError(f"config file '{path}' must hold keys and values, not {type(content).__name__}")
    _check_plain(content, path, "")
    return Fragment(path, content)


def parse_yaml(file: Path, loader_class: type[yaml.SafeLoader] = _Loader) -> Any:
    """What a YAML file holds.

    Raises:
        yaml.YAMLError, ValueError, RecursionError, OSError: it is none, or larger than a config is; aliases count as
            what they stand for.
    """
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"it is larger than {MOST_BYTES:,} bytes")
    loader = loader_class(file.read_text(encoding="utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise ValueError(f"it holds more than {MOST_NODES:,} values once its aliases are filled in")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of nodes at and below a node with aliases filled in; ValueError for one that contains itself."""
    if id(node) not in known:
        known[id(node)] = -1  # being counted
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    if known[id(node)] < 0:
        raise ValueError("an alias contains itself")
    return known[id(node)]


def _check_plain(node: Any, path: str, key: str) -> None:
    """Raise UserError for what is neither mapping, list, text, number, true, false nor null, and for odd keys."""
    where = f"config file '{path}': " + (key or "the first level")
    if isinstance(node, dict):
        for name, value in node.items():
            if not isinstance(name, str):
                raise UserError(f"{where} has the key {name!r}, {_kind(name)}; write it in quotation marks")
            _check_plain(value, path, f"{key}.{name}" if key else name)
    elif isinstance(node, list):
        for value in node:
            _check_plain(value, path, key)
    elif node is not None and not isinstance(node, str | int | float):
        raise UserError(f"{where} is {_kind(node)}; if text is meant, write it in quotation marks")


def _kind(value: Any) -> str:
    """What YAML took a value for, in words."""
    words = {"bool": "true or false", "NoneType": "null", "int": "a number", "float": "a number"}
    return words.get(type(value).__name__, f"a {type(value).__name__}")


def merge(base: dict[str, Any], update: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one, key by key; `update` wins, lists of callbacks, loggers and imports are joined."""
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


def compose(fragments: list[Fragment]) -> dict[str, Any]:
    """The merged content of config files."""
    merged: dict[str, Any] = {}
    for fragment in fragments:
        merged = merge(merged, fragment.content)
    return merged


def lookup(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted option such as model.ffn.gate, whose levels `init_args` need not be spelled.

    Raises:
        KeyError: it is not there.
    """
    value: Any = config
    for part in key.split("."):
        if isinstance(value, dict) and part not in value:
            value = next((value[level] for level in CLASS_LEVELS if part in (value.get(level) or {})), value)
        if not isinstance(value, dict) or part not in value:
            raise KeyError(key)
        value = value[part]
    return value


def origin(fragments: list[Fragment], key: str) -> Fragment | None:
    """The last file that gives a dotted option, the one that decides; None where none does."""
    for fragment in reversed(fragments):
        try:
            lookup(fragment.content, key)
        except KeyError:
            continue
        return fragment
    return None


def auto_precision(accelerator: str = "auto") -> tuple[str, str]:
    """The precision that `auto` means on this machine, and why.

    bf16-mixed where the device multiplies bfloat16 matrices in hardware, otherwise 32-true.

    Args:
        accelerator: the Trainer's option: auto, gpu, cuda, cpu, ...
    """
    import torch

    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    if on_gpu:
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = accelerator in ("auto", "cpu") and cpu_has_bf16()
    device = "GPU" if on_gpu else "processor"
    if fast:
        return "bf16-mixed", f"this {device} multiplies bfloat16 in hardware"
    return "32-true", f"this {device} has no bfloat16 matrix instructions"


def cpu_has_bf16() -> bool:
    """Whether this processor has bfloat16 dot-product or matrix instructions (x86: avx512_bf16 or amx; Arm: bf16)."""
    if platform.machine() not in ARM_AND_X86:
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(line.split()))
