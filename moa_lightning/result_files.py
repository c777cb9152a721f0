"""Where the result of `moa test` goes: test.json for the run's own data, a file of another name for any other.

What differs is in the name, so a result on corrupted images, on another source or against another bank never takes the
place of the run's own, which grids and reports read. The options that differ stand inside the file too.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

LONGEST = 80  # characters of a name
# what changes neither the images or texts that are judged nor those that they are compared with
WITHOUT_EFFECT = ("batch_size", "num_workers", "shuffle_block", "on_bad_sample", "transform", "max_val_samples")

OPEN = ("image_size", "channels", "mean", "std")  # taken from the checkpoint where the run's config leaves them open


def changed_options(used: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of data, dotted, with which a test differs from its run.

    Args:
        used: the data of the test, as the parser has them.
        own: those in the run's config.yaml; what a run from before an option lacks is taken as the same.
    """
    now, before = _flat(used, ""), {"corruption": None, **_flat(own, "")}
    found = {name: value for name, value in now.items() if name in before and value != before[name]}
    found = {name: value for name, value in found.items() if before[name] is not None or _last(name) not in OPEN}
    if now.get("corruption") is not None and "corruption" in found:
        found["severity"] = now["severity"]
    elif now.get("corruption") is None:
        found.pop("severity", None)
    return {name: value for name, value in found.items() if not set(name.split(".")) & set(WITHOUT_EFFECT)}


def _flat(given: Any, key: str) -> dict[str, Any]:
    """Dotted option -> value as JSON has it, without the levels that a command line does not spell."""
    if not isinstance(given, Mapping):
        return {key: json.loads(json.dumps(given, default=str))}
    found: dict[str, Any] = {}
    for name, value in given.items():
        inside = key if name == "init_args" else f"{key}.{name}" if key else str(name)
        found |= _flat(value, inside)
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def result_name(changed: Mapping[str, Any]) -> str:
    """Name of the file: test.json, test-fog-3.json, test-source-fashion_mnist.json."""
    parts = []
    for name, value in changed.items():
        if name == "corruption" and value is not None:
            parts.append(f"{value}-{changed['severity']}")
        elif name != "severity" or changed.get("corruption") is None:
            end = str(value).rstrip("/").rpartition("/")[2] or "root"
            parts.append(f"{_last(name)}-{end}")
    text = re.sub(r"[^\w.+-]+", "_", "-".join(["test", *parts]))
    if len(text) > LONGEST or any("/" in str(value) for value in changed.values()):  # folders of one name
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]
        text = f"{text[:LONGEST]}-{digest}"
    return f"{text}.json"
