"""Reads a grid file. Everything that can be wrong in it is found before anything is trained: here unknown and repeated
keys, missing or unreadable config files, values of the wrong kind; by grid_checks.py what parts say of one another.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from moa_lightning.configs import parse_yaml
from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import (
    OTHER_RUN,
    Budget,
    Cluster,
    Config,
    Grid,
    GridTask,
    GridTest,
    GridVariant,
    Interaction,
    Outcome,
    Seeds,
    Tuning,
)
from moa_lightning.experiments.grid_checks import BUDGET_OPTIONS, check_grid

GRID_KEYS = (
    *("name", "out", "seeds", "baseline", "tasks", "axes", "variants", "overrides", "budget", "tune", "jobs"),
    *("cluster", "interactions"),
)
TASK_KEYS = (
    *("config", "metric", "mode", "test_metric", "effect", "target", "target_sd", "overrides", "budget", "tune"),
    *("axes", "variants", "judged", "tests"),
)
TEST_KEYS = ("config", "overrides", "metric", "mode")
AXIS_KEYS = ("config", "overrides", "budget")
VARIANT_KEYS = ("config", "overrides", "against", "freeze_gates")
INTERACTION_KEYS = ("name", "of", "against")
TUNE_KEYS = ("seeds", "options", "overrides", "budget")
SEED_KEYS = ("pilot", "most", "power")
UNITS = ("steps", "samples", "tokens", "tokens_per_parameter", "flops")
CLUSTERS = ("slurm", "local")
RESERVED_OPTIONS = ("config", "run_dir", "seed_everything", "ckpt_path")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")

Resolve = Callable[[str], Path]  # the name of a config fragment -> its file, or UserError


def load_grid(path: Path, resolve: Resolve) -> Grid:
    """Read and check a grid file.

    Raises:
        UserError: for whatever is wrong in the file, with the place.
    """
    raw = _mapping(_read_yaml(path), str(path), GRID_KEYS)
    for key in ("seeds", "baseline", "tasks", "variants"):
        if not raw.get(key):
            raise UserError(f"{path} has no `{key}`: a grid needs seeds, a baseline, tasks and variants.")
    tuning, tuned = _tuning(raw.get("tune"), f"{path}: tune")
    seeds = _seeds(raw["seeds"], str(path))
    variants = tuple(_variant(name, entry, resolve) for name, entry in _named(raw["variants"], f"{path}: variants"))
    overrides = _overrides(raw.get("overrides"), f"{path}: overrides")
    budget = _budget(raw.get("budget"), f"{path}: budget")
    axes = _mapping(raw.get("axes") or {}, f"{path}: axes", None)
    tasks: list[GridTask] = []
    for name, entry in _named(raw["tasks"], f"{path}: tasks"):
        task = _task(name, entry, resolve)
        task = replace(task, budget=task.budget or budget, tune=task.tune if "tune" in entry else tuned)
        tasks += _with_axes(task, {**axes, **_mapping(entry.get("axes") or {}, f"task {name}: axes", None)}, resolve)
    name = str(raw.get("name", path.stem))
    jobs = raw.get("jobs", 1)
    if not _is_int(jobs) or jobs < 1:
        raise UserError(f"{path}: jobs is {jobs!r}; give the number of runs at a time, 1 or more.")
    out = raw.get("out", f"runs/{name}")
    if not isinstance(out, str):
        raise UserError(f"{path}: out is {out!r}; give the folder of the runs, or remove the line.")
    cluster = _cluster(raw.get("cluster"), f"{path}: cluster")
    interactions = _interactions(raw.get("interactions"), f"{path}: interactions")
    grid = Grid(
        *(name, Path(out), seeds, raw["baseline"], tuple(tasks), variants, overrides, jobs, tuning, cluster, path),
        interactions=interactions,
    )
    check_grid(grid, str(path))
    return grid


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


def _seeds(entry: Any, where: str) -> Seeds:
    if not isinstance(entry, dict):
        fixed = check_seeds(entry, where)
        return Seeds(fixed, len(fixed))
    entry = _mapping(entry, f"{where}: seeds", SEED_KEYS)
    pilot, most, power = check_seeds(entry.get("pilot"), f"{where}: pilot"), entry.get("most"), entry.get("power", 0.8)
    if len(pilot) < 3:
        raise UserError(f"{where}: a pilot of {len(pilot)} seeds tells too little about their spread; give 3 or more.")
    if not _is_int(most) or most < len(pilot):
        raise UserError(f"{where}: seeds has most: {most!r}; give the largest number of seeds, {len(pilot)} or more.")
    if not isinstance(power, float) or not 0.5 <= power < 1:
        raise UserError(f"{where}: seeds has power: {power!r}; give a probability from 0.5 to below 1, such as 0.8.")
    return Seeds(pilot, most, power)


def _tuning(entry: Any, where: str) -> tuple[Tuning | None, Mapping[str, tuple[str, ...]]]:
    """How options are tuned, and the options that tasks tune which have no list of their own."""
    if entry is None:
        return None, {}
    entry = _mapping(entry, where, TUNE_KEYS)
    seeds, overrides = check_seeds(entry.get("seeds"), where), _overrides(entry.get("overrides"), where)
    budget = _budget(entry.get("budget"), where)
    if budget is not None and (clash := [option for option in BUDGET_OPTIONS if option in overrides]):
        raise UserError(f"{where} has a budget and the option {clash[0]}; remove one of them.")
    return Tuning(seeds, overrides, budget), _values(entry.get("options") or {}, where)


def _interactions(entry: Any, where: str) -> tuple[Interaction, ...]:
    if not isinstance(entry, list | None):
        raise UserError(f"{where} is {entry!r}; give a list such as [{{name: x, of: [a, b], against: [c, d]}}].")
    found = []
    for each in entry or ():
        each = _mapping(each, where, INTERACTION_KEYS)
        name, of, against = each.get("name"), each.get("of"), each.get("against")
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{where}: name is {name!r}; use letters, digits and . _ + - only.")
        if not (isinstance(of, list) and isinstance(against, list) and len(of) == len(against) == 2):
            raise UserError(
                f"{where}: {name} needs two variants in `of` and two in `against`; found {of!r}, {against!r}."
            )
        if not _is_list_of_names([*of, *against]):
            raise UserError(f"{where}: {name} is between four different variants; found {of!r} and {against!r}.")
        found.append(Interaction(name, (of[0], of[1]), (against[0], against[1])))
    return tuple(found)


def _values(entry: Any, where: str) -> dict[str, tuple[str, ...]]:
    """Options with the values to try."""
    values: dict[str, tuple[str, ...]] = {}
    for option, given in _mapping(entry, where, None).items():
        if not isinstance(given, list) or len(given) < 2:
            raise UserError(f"{where}: {option} is {given!r}; give a list of two or more values to try.")
        values[option] = tuple(_overrides({option: value}, where)[option] for value in given)
        if len(set(values[option])) < len(given):
            raise UserError(f"{where}: {option} repeats a value; give each once.")
    return values


def _task(name: str, entry: Any, resolve: Resolve) -> GridTask:
    where = f"task {name}"
    entry = _mapping(entry, where, TASK_KEYS)
    configs = _configs(entry, where, resolve)
    if not configs:
        raise UserError(f"{where} names no config file; give `config: [...]`.")
    if not isinstance(entry.get("metric"), str):
        raise UserError(f"{where} has no metric; name the one that decides, such as `metric: val/loss`.")
    if entry.get("mode") not in ("min", "max"):
        raise UserError(f"{where} has mode {entry.get('mode')!r}; say whether less or more is better: min or max.")
    if not isinstance(entry.get("test_metric", ""), str):
        raise UserError(f"{where} has test_metric {entry['test_metric']!r}; name a metric such as test/loss.")
    effect = entry.get("effect")
    if effect is not None and not _number(effect) > 0:
        raise UserError(f"{where} has effect {effect!r}; give the smallest difference that matters, above 0.")
    target, target_sd = entry.get("target"), entry.get("target_sd")
    if target is not None and not math.isfinite(_number(target)):
        raise UserError(f"{where} has target {target!r}; give a value of {entry['metric']}.")
    if target_sd is not None and not 0 < _number(target_sd) < math.inf:
        raise UserError(f"{where} has target_sd {target_sd!r}; give the standard deviation of a run, above 0.")
    variants, judged = entry.get("variants"), entry.get("judged", True)
    if variants is not None and not _is_list_of_names(variants):
        raise UserError(f"{where} has variants {variants!r}; give a list of names, each once, or remove the line.")
    if not isinstance(judged, bool):
        raise UserError(f"{where} has judged {judged!r}; give true or false.")
    return GridTask(
        name,
        configs,
        entry["metric"],
        entry["mode"],
        _overrides(entry.get("overrides"), where),
        entry.get("test_metric"),
        None if effect is None else _number(effect),
        None if target is None else _number(target),
        None if target_sd is None else _number(target_sd),
        budget=_budget(entry.get("budget"), where),
        tune=_values(entry.get("tune") or {}, where),
        base=name,
        variants=None if variants is None else tuple(variants),
        judged=judged,
        tests=tuple(
            _test(test, given, f"{where}: test {test}", entry, resolve)
            for test, given in _named(entry.get("tests") or {}, f"{where}: tests")
        ),
    )


def _test(name: str, entry: Any, where: str, task: Mapping[str, Any], resolve: Resolve) -> GridTest:
    """A measurement more; its metric and mode are those of the task's own test where it names none."""
    entry = _mapping(entry, where, TEST_KEYS)
    configs, options = _configs(entry, where, resolve), _overrides(entry.get("overrides"), where)
    if not configs and not options:
        raise UserError(f"{where} differs in nothing from `moa test`; give `overrides` or `config: [...]`.")
    if named := [option for option, value in options.items() if OTHER_RUN.search(value)]:
        raise UserError(f"{where}: {named[0]} names another run, which a test cannot; write out what it needs.")
    metric, mode = entry.get("metric", task.get("test_metric")), entry.get("mode", task["mode"])
    if not isinstance(metric, str):
        raise UserError(f"{where} has metric {metric!r}; name what `moa test` reports, such as test/top1.")
    if mode not in ("min", "max"):
        raise UserError(f"{where} has mode {mode!r}; say whether less or more is better: min or max.")
    return GridTest(configs, tuple(options.items()), Outcome(metric, mode, name))


def _with_axes(task: GridTask, axes: Any, resolve: Resolve) -> Iterator[GridTask]:
    """The task at each combination of the axes' values; itself where there are no axes."""
    choices = [
        [(axis, value, entry) for value, entry in _named(values, f"axis {axis}")]
        for axis, values in _named(axes, f"task {task.name}: axes")
    ]
    for found, (name, values) in zip(choices, axes.items(), strict=True):
        if not found:
            raise UserError(f"axis {name} of task {task.name} has no values ({values!r}); give some, or remove it.")
    for combination in itertools.product(*choices):
        part = task
        for axis, value, entry in combination:
            where = f"axis {axis}, {value}"
            entry = _mapping(entry if entry is not None else {}, where, AXIS_KEYS)
            part = replace(
                part,
                name=f"{part.name}-{value}",
                configs=part.configs + _configs(entry, where, resolve),
                overrides={**part.overrides, **_overrides(entry.get("overrides"), where)},
                budget=_budget(entry.get("budget"), where) or part.budget,
                axes={**part.axes, axis: value},
            )
        yield part


def _variant(name: str, entry: Any, resolve: Resolve) -> GridVariant:
    where = f"variant {name}"
    entry = _mapping(entry if entry is not None else {}, where, VARIANT_KEYS)
    overrides = _overrides(entry.get("overrides"), where)
    batches = entry.get("freeze_gates")
    if batches is not None and (not _is_int(batches) or batches < 1):
        raise UserError(f"{where}: freeze_gates is {batches!r}; give the batches to average the gates over, 1 or more.")
    return GridVariant(name, _configs(entry, where, resolve), overrides, entry.get("against"), batches)


def _budget(entry: Any, where: str) -> Budget | None:
    if entry is None:
        return None
    entry = _mapping(entry, where, (*UNITS, "validations"))
    units = [unit for unit in UNITS if unit in entry]
    if len(units) != 1:
        raise UserError(f"{where}: a budget is one of {', '.join(UNITS)}; found {', '.join(units) or 'none of them'}.")
    amount, validations = _number(entry[units[0]]), entry.get("validations")
    if not 0 < amount < math.inf:
        raise UserError(f"{where}: {units[0]} is {entry[units[0]]!r}; give a number above 0.")
    if validations is not None and (not _is_int(validations) or validations < 1):
        raise UserError(f"{where}: validations is {validations!r}; give their number in a run, 1 or more.")
    return Budget(units[0], amount, validations)


def _cluster(entry: Any, where: str) -> Cluster | None:
    if entry is None:
        return None
    entry = dict(_mapping(entry, where, None))
    kind = entry.pop("kind", "slurm")
    if kind not in CLUSTERS:
        raise UserError(f"{where}: kind is {kind!r}; choose from {', '.join(CLUSTERS)}.")
    return Cluster(kind, entry)


def _configs(entry: dict[str, Any], where: str, resolve: Resolve) -> tuple[Config, ...]:
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
    return {key: _typed(value, f"{where}: {key}") for key, value in options.items()}


def _typed(value: Any, where: str) -> str:
    """A value as it is typed on a command line."""
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except TypeError:  # dates, sets and binary data of YAML
        raise UserError(f"{where} is {value!r} to YAML; put it in quotes if text is meant.") from None


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


def _is_list_of_names(value: Any) -> bool:
    """Whether it is a list of different texts, one or more."""
    return isinstance(value, list) and all(isinstance(n, str) for n in value) and 0 < len(value) == len(set(value))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> float:
    """A number, also one that YAML takes for text (1e6); NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


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
