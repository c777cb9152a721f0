"""The grid file: tasks x variants x seeds, and the `moa fit` command that each combination stands for.

Everything that can be wrong in a grid file is found here, before anything is trained: unknown and repeated keys,
missing or unreadable config files, a baseline that is no variant. A run's fingerprint holds what decides its result
(the options and the parsed content of its config files, so that a comment may change) and leaves out where it is
stored, so that a finished grid may be moved.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from moa_lightning.configs import parse_yaml
from moa_lightning.errors import UserError

GRID_KEYS = ("name", "out", "seeds", "baseline", "tasks", "variants", "overrides", "jobs")
TASK_KEYS = ("config", "metric", "mode", "overrides")
VARIANT_KEYS = ("config", "overrides")
RESERVED_OPTIONS = ("config", "run_dir", "seed_everything", "ckpt_path")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


class Config(NamedTuple):
    """A config fragment: the name typed in the grid, the file that it is, the hash of the parsed content."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class GridTask:
    """What is trained, and the metric that decides, declared beforehand."""

    name: str
    configs: tuple[Config, ...]
    metric: str  # a name in result.json's `metrics`
    mode: str  # "min" or "max": which direction is better
    overrides: Mapping[str, str] = field(default_factory=dict)  # dotted option -> value as on the command line


@dataclass(frozen=True)
class GridVariant:
    """What is compared."""

    name: str
    configs: tuple[Config, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)  # wins over the task's, which win over the grid's


@dataclass(frozen=True)
class Run:
    """One combination: a `moa fit` process with a folder of its own."""

    task: str
    variant: str
    seed: int
    folder: Path
    configs: tuple[Config, ...]
    options: tuple[tuple[str, str], ...]  # dotted option, value

    @property
    def name(self) -> str:
        return f"{self.task}/{self.variant}/seed{self.seed}"

    def arguments(self, resume: bool = False) -> list[str]:
        """What follows `moa` on the command line."""
        configs = [word for config in self.configs for word in ("-c", str(config.path))]
        options = [f"--{option}={value}" for option, value in self.options]  # "=": a value may start with a dash
        place = ["--run_dir", str(self.folder), "--seed_everything", str(self.seed)]
        return ["fit", *configs, *place, *options, *(["--ckpt_path", "last"] if resume else [])]

    def fingerprint(self) -> dict[str, str]:
        """What decides the result, by part: order of the fragments, content of each, options, seed."""
        contents = {config.name: config.digest for config in self.configs}
        order = " ".join(config.name for config in self.configs)
        return {"order of configs": order, "seed": str(self.seed), **contents, **dict(self.options)}


@dataclass(frozen=True)
class Grid:
    """A checked grid file."""

    name: str
    out: Path
    seeds: tuple[int, ...]
    baseline: str
    tasks: tuple[GridTask, ...]
    variants: tuple[GridVariant, ...]
    overrides: Mapping[str, str]
    jobs: int  # runs at a time

    @property
    def threads(self) -> int:
        """CPU threads that each run may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.jobs)

    @property
    def modules(self) -> set[str]:
        """Modules that the runs import by an override."""
        options = [self.overrides, *(task.overrides for task in self.tasks), *(v.overrides for v in self.variants)]
        return {part["import"] for part in options if "import" in part}

    def runs(self) -> list[Run]:
        """All runs, seeds outermost: a grid that stops half-way has compared all variants on the first seeds."""
        return [
            self._run(task, variant, seed) for seed in self.seeds for task in self.tasks for variant in self.variants
        ]

    def _run(self, task: GridTask, variant: GridVariant, seed: int) -> Run:
        folder = self.out / task.name / variant.name / f"seed{seed}"
        options = {**self.overrides, **task.overrides, **variant.overrides}
        return Run(task.name, variant.name, seed, folder, task.configs + variant.configs, tuple(options.items()))


def load_grid(path: Path, resolve: Callable[[str], Path]) -> Grid:
    """Read and check a grid file; `resolve` turns the name of a config fragment into a file or raises UserError.

    Raises:
        UserError: for whatever is wrong in the file, with the place.
    """
    raw = _mapping(_read_yaml(path), str(path), GRID_KEYS)
    for key in ("seeds", "baseline", "tasks", "variants"):
        if not raw.get(key):
            raise UserError(f"{path} has no `{key}`: a grid needs seeds, a baseline, tasks and variants.")
    tasks = tuple(_task(name, entry, resolve) for name, entry in _named(raw["tasks"], f"{path}: tasks"))
    variants = tuple(_variant(name, entry, resolve) for name, entry in _named(raw["variants"], f"{path}: variants"))
    names = [variant.name for variant in variants]
    if raw["baseline"] not in names:
        raise UserError(f"{path}: baseline {raw['baseline']!r} is not a variant; choose one of {', '.join(names)}.")
    name = str(raw.get("name", path.stem))
    jobs = raw.get("jobs", 1)
    if not _is_int(jobs) or jobs < 1:
        raise UserError(f"{path}: jobs is {jobs!r}; give the number of runs at a time, 1 or more.")
    overrides = _overrides(raw.get("overrides"), f"{path}: overrides")
    out = Path(str(raw.get("out", f"runs/{name}")))
    return Grid(name, out, check_seeds(raw["seeds"], str(path)), raw["baseline"], tasks, variants, overrides, jobs)


def check_seeds(seeds: Any, where: str) -> tuple[int, ...]:
    """Seeds as a tuple of different whole numbers >= 0; UserError otherwise."""
    if not isinstance(seeds, list) or not seeds or not all(_is_int(seed) and seed >= 0 for seed in seeds):
        raise UserError(f"{where}: seeds is {seeds!r}; give a list of whole numbers such as [0, 1, 2].")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{where}: seeds {seeds!r} repeats a seed; give each once.")
    return tuple(seeds)


def digest(path: Path) -> str:
    """Hash of what a YAML file says, whatever its comments and layout."""
    return hashlib.sha256(json.dumps(_read_yaml(path), sort_keys=True, default=str).encode()).hexdigest()


def _task(name: str, entry: Any, resolve: Callable[[str], Path]) -> GridTask:
    where = f"task {name}"
    entry = _mapping(entry, where, TASK_KEYS)
    configs = _configs(entry, where, resolve)
    if not configs:
        raise UserError(f"{where} names no config file; give `config: [...]`.")
    if not isinstance(entry.get("metric"), str):
        raise UserError(f"{where} has no metric; name the one that decides, such as `metric: val/loss`.")
    if entry.get("mode") not in ("min", "max"):
        raise UserError(f"{where} has mode {entry.get('mode')!r}; say whether less or more is better: min or max.")
    return GridTask(name, configs, entry["metric"], entry["mode"], _overrides(entry.get("overrides"), where))


def _variant(name: str, entry: Any, resolve: Callable[[str], Path]) -> GridVariant:
    where = f"variant {name}"
    entry = _mapping(entry if entry is not None else {}, where, VARIANT_KEYS)
    return GridVariant(name, _configs(entry, where, resolve), _overrides(entry.get("overrides"), where))


def _configs(entry: dict[str, Any], where: str, resolve: Callable[[str], Path]) -> tuple[Config, ...]:
    names = entry.get("config", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: config is {names!r}; give a list of YAML files.")
    paths = [resolve(name) for name in names]
    return tuple(Config(name, path, digest(path)) for name, path in zip(names, paths, strict=True))


def _overrides(entry: Any, where: str) -> dict[str, str]:
    """Options as typed on a command line: text as it is, everything else as JSON (true, null, [0.9, 0.95])."""
    options = _mapping(entry if entry is not None else {}, where, None)
    for option in options:
        if option in RESERVED_OPTIONS:
            raise UserError(f"{where}: {option} is set by the grid for each run; remove it from the overrides.")
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}


def _named(entry: Any, where: str) -> Iterator[tuple[str, Any]]:
    for name, value in _mapping(entry, where, None).items():
        if not NAME.fullmatch(name):
            raise UserError(f"{where}: {name!r} names folders too; use letters, digits and . _ + - only.")
        yield name, value


def _mapping(entry: Any, where: str, known: tuple[str, ...] | None) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected `key: value` lines, found {entry!r}.")
    for key in entry:
        if not isinstance(key, str):
            raise UserError(f"{where}: the key {key!r} is not text to YAML; put it in quotes.")
        if known is not None and key not in known:
            raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(known)}.")
    return entry


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML would silently keep the last of two keys of the same name, and with it drop a variant."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in written:
            if written.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice in line {node.start_mark.line + 1} and after")
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> Any:
    try:
        return parse_yaml(path, _StrictLoader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
