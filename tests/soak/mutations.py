"""Seeded damage: to bytes, to the tree of a config, to a checkpoint."""

import copy
import os
import random
from typing import Any

import yaml

# what may stand where something else was expected. No number above 1, so that no case asks for more processes or a net
# that is merely large, but for one that is larger than anything
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 0.5, -0.5, 1e-9, 10**30, float("inf"), float("nan"), "", "x", " ", "\x1b[31m", "é", "a.b.c",
    [], {}, [None], [[]], [-1], {"a": 1}, ["x", 1], "null", "[1, 2", "{a: ", "os.system", "evil.Sly", "evil.run",
    "../up", "pipe:touch canary", "http://127.0.0.1:1", "/dev/null", "/dev/stdin", "configs",
    {"class_path": "evil.Sly"},
    {"class_path": "os.system", "init_args": {"command": "touch canary"}}, [{"class_path": "evil.Sly"}],
    {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"setup": "evil.run"}},
    {"class_path": 1}, {"init_args": None}, {"class_path": "tasks.MAE"}, {"class_path": "data.MultiCrop"},
)  # fmt: skip
LINES = (
    "evil: !!python/object/apply:os.system [touch canary]",
    "model: !!python/object/new:evil.Sly []",
    "import: [evil]",
    "a: &a [*a]",
    "\n".join(f"x{n + 1}: &x{n + 1} [" + f"*x{n}, " * 9 + "]" for n in range(9)).replace("*x0", "1"),
    "a: " + "[" * 3000,
    "\t- x",
    "? [a]\n: b",
    "a: 2026-99-99",
    "%YAML 9.9",
    "---\n---",
    "<<: 3",
)  # fmt: skip


def damage(content: bytes, draw: random.Random) -> bytes:
    """A few edits of bytes: flipped, cut off, removed, repeated, zeroed, inserted."""
    result = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        size = len(result)
        start = draw.randrange(size + 1)
        stop = min(size, start + draw.choice((1, 4, 100, 5000)))
        match draw.randrange(7):
            case 0:
                for _ in range(draw.choice((1, 10, 300))):
                    if size:
                        result[draw.randrange(size)] ^= 1 << draw.randrange(8)
            case 1:
                del result[start:]
            case 2:
                del result[start:stop]
            case 3:
                result[start:start] = result[start:stop]
            case 4:
                result[start:stop] = bytes(stop - start)
            case 5:
                result[start:start] = draw.randbytes(draw.choice((1, 16, 2000)))
            case 6:
                result[start:stop] = bytes(draw.choice((b"9" * (stop - start), b"\xff" * (stop - start))))
    return bytes(result)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all nodes below the root of a tree."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


def change_tree(tree: Any, draw: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """One to three nodes removed, renamed, exchanged, moved or given another value."""
    result = copy.deepcopy(tree)
    for _ in range(draw.choice((1, 1, 2, 3))):
        found = places(result)
        if not found:
            return result
        *above, last = draw.choice(found)
        parent = result
        for key in above:
            parent = parent[key]
        match draw.randrange(6):
            case 0:
                del parent[last]
            case 1 if isinstance(parent, dict):
                parent[draw.choice((f"{last}s", "class_path", "init_args", "", str(last)[:-1]))] = parent.pop(last)
            case 2 if isinstance(parent, dict):
                parent[draw.choice(("extra", "class_path", "import", "callbacks"))] = copy.deepcopy(draw.choice(values))
            case 3:
                parent[last] = copy.deepcopy(result if len(found) < 200 else last)
            case _:
                parent[last] = copy.deepcopy(draw.choice(values))
    return result


def change_config(config: dict[str, Any], draw: random.Random) -> bytes:
    """The text of a damaged config file: its tree, its bytes, or a line that does not belong there."""
    text = yaml.safe_dump(config, sort_keys=False).encode()
    match draw.randrange(6):
        case 0:
            return damage(text, draw)
        case 1:
            lines = text.decode().splitlines()
            lines.insert(draw.randrange(len(lines) + 1), draw.choice(LINES))
            return "\n".join(lines).encode()
        case _:
            return yaml.safe_dump(change_tree(config, draw), sort_keys=False, allow_unicode=True).encode()


class Payload:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Payload":
        return self  # the default would reduce it, and so run it
