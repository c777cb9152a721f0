"""What a grid is made of: tasks x axes x variants x seeds, and the `moa fit` command that each combination stands for.

A run's fingerprint holds what decides its result (the options and the parsed content of its config files, so that a
comment may change) and leaves out where it is stored, so that a finished grid may be moved. An option may name another
run of the grid, {run:variant}, and begins after it. What a finished run is measured by beside its training (`tests`)
is no part of it. Which runs a grid comes to is partly decided by the results of others (tuned options, number of
seeds): see schedule.py. Grid files are read by grid_file.py.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from moa_lightning.run_folder import CHECKPOINTS, HELD, LAST, TEST

SEED = "{seed}"  # in an option: the seed of the run
VARIANT = "{variant}"  # in an option: the variant of the run, as in {run:pretrain/{variant}}
TESTS = "tests"  # folder in a run's, with the results of its task's `tests`
OTHER_RUN = re.compile(r"\{run:([^{}]*)\}")  # in an option: the folder of another run with the same seed


class Config(NamedTuple):
    """A config fragment: the name typed in the grid, the file that it is, the hash of the parsed content."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Budget:
    """The length of a run, in something that variants can have in common."""

    unit: str
    """steps, samples, tokens, tokens_per_parameter or flops"""
    amount: float
    validations: int | None = None
    """evenly spaced validations in a run; None leaves their rhythm to the config"""


class Outcome(NamedTuple):
    """A metric by which the variants of a task are compared."""

    metric: str
    mode: str
    """"min" or "max": which direction is better"""
    test: str = ""
    """one of the task's `tests`; "": the task's own"""

    @property
    def column(self) -> str:
        """Its name among the metrics of a result."""
        return f"{self.test}/{self.metric}" if self.test else self.metric


@dataclass(frozen=True)
class GridTest:
    """A measurement more of every final run: `moa test` with these options, such as corrupted images."""

    configs: tuple[Config, ...]
    options: tuple[tuple[str, str], ...]
    """dotted option, value"""
    outcome: Outcome

    @property
    def folder(self) -> str:
        """Where `moa test` writes, in the run's folder: other options make another measurement."""
        parts = [*((config.name, config.digest) for config in self.configs), *self.options]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
        return f"{TESTS}/{self.outcome.test}-{digest}"

    @property
    def result(self) -> str:
        """Pattern of the file with its result, in the run's folder; `moa test` has what differs in its name."""
        return f"{self.folder}/test*.json"


@dataclass(frozen=True)
class GridTask:
    """What is trained, and the metric that decides, declared beforehand. A value of an axis makes another task."""

    name: str
    configs: tuple[Config, ...]
    metric: str
    """a name in result.json's `metrics`, measured on the validation split"""
    mode: str
    """"min" or "max": which direction is better"""
    overrides: Mapping[str, str] = field(default_factory=dict)
    """dotted option -> value as on the command line"""
    test_metric: str | None = None
    """what `moa test` reports, once, of each final run; then it decides in place of `metric`"""
    effect: float | None = None
    """smallest difference of the deciding metric that matters, for the number of seeds"""
    target: float | None = None
    """value of the deciding metric that the report says of every variant whether its runs have reached it"""
    target_sd: float | None = None
    """standard deviation of one run's metric that the speed-run rule assumes; None: modded-nanogpt's"""
    budget: Budget | None = None
    tune: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """option -> values among which each variant's best is looked for"""
    axes: Mapping[str, str] = field(default_factory=dict)
    """axis -> the value that this task has there"""
    base: str = ""
    """name in the grid file, without the axes"""
    variants: tuple[str, ...] | None = None
    """those that it has; None: all of the grid"""
    judged: bool = True
    """False: its runs are there for other tasks, and nothing is claimed about them"""
    tests: tuple[GridTest, ...] = ()
    """measurements that are compared beside `final_metric`"""

    @property
    def final_metric(self) -> str:
        """The metric that comparisons are about."""
        return self.test_metric or self.metric

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All metrics that comparisons are about, the one that decides on the seeds first."""
        return Outcome(self.final_metric, self.mode), *(test.outcome for test in self.tests)


@dataclass(frozen=True)
class GridVariant:
    """What is compared."""

    name: str
    configs: tuple[Config, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)
    """wins over the axes', which win over the task's, which win over the grid's"""
    against: str | None = None
    """the variant that it is compared with; None: the grid's baseline"""
    freeze_gates: int | None = None
    """batches over which the gates of finished runs are averaged, to measure once more what is left without them"""


@dataclass(frozen=True)
class Interaction:
    """A difference of differences: does what is between two variants differ from what is between two others?"""

    name: str
    of: tuple[str, str]
    against: tuple[str, str]

    @property
    def weights(self) -> dict[str, int]:
        """Of the variants' metrics: (of[0] - of[1]) - (against[0] - against[1])."""
        return dict(zip((*self.of, *self.against), (1, -1, -1, 1), strict=True))

    def __str__(self) -> str:
        return f"({self.of[0]} - {self.of[1]}) - ({self.against[0]} - {self.against[1]})"


@dataclass(frozen=True)
class Tuning:
    """How options are tuned: each variant gets the same values and the same seeds, which no final run has."""

    seeds: tuple[int, ...]
    overrides: Mapping[str, str]
    """for tuning runs only, such as a shorter length"""
    budget: Budget | None = None
    """length of tuning runs; None: that of the final ones"""


@dataclass(frozen=True)
class Seeds:
    """Of the final runs: a fixed list, or a pilot and as many more as the wanted power asks for."""

    pilot: tuple[int, ...]
    most: int
    """number of seeds at which a task stops asking for more; the pilot's for a fixed list"""
    power: float = 0.8
    """wanted probability of showing a difference of a task's `effect`"""

    def first(self, number: int) -> tuple[int, ...]:
        """So many seeds: the pilot's, then the numbers after its largest."""
        more = range(max(self.pilot) + 1, max(self.pilot) + 1 + number - len(self.pilot))
        return (*self.pilot, *more)


@dataclass(frozen=True)
class Cluster:
    """Where runs go as jobs of a batch system, through submitit."""

    kind: str
    """"slurm", or "local": processes of this machine, which try out the same path"""
    parameters: Mapping[str, Any]
    """of submitit's executor: timeout_min, slurm_partition, gpus_per_node, ..."""


class Need(NamedTuple):
    """A run that another one names in an option."""

    placeholder: str
    """{run:...}, as it stands there"""
    task: str
    variant: str
    folder: Path
    digest: str = ""
    """of its fingerprint, so that a run on top of one that has changed has changed as well"""


@dataclass(frozen=True)
class Run:
    """One combination: a `moa fit` process with a folder of its own."""

    task: str
    variant: str
    seed: int
    folder: Path
    configs: tuple[Config, ...]
    options: tuple[tuple[str, str], ...]
    """dotted option, value"""
    metric: str
    """what it must report on the validation split"""
    setting: str | None = None
    """of a tuning run: the values that it tries, such as lr=0.002"""
    test_metric: str | None = None
    """what it must report on the test split"""
    needs: tuple[Need, ...] = ()
    """runs of the same seed that must have finished before"""
    freeze_gates: int | None = None
    """see GridVariant"""
    tests: tuple[GridTest, ...] = ()
    """of the task; none of a tuning run"""

    @property
    def name(self) -> str:
        tried = f"tune/{self.setting}/" if self.setting else ""
        return f"{self.task}/{self.variant}/{tried}seed{self.seed}"

    def arguments(self) -> list[str]:
        """What follows `moa` to begin the run, or to go on where it stopped."""
        return ["fit", *self.config_arguments(), "--run_dir", str(self.folder), "--ckpt_path", "auto"]

    def later_arguments(self) -> dict[str, list[str]]:
        """What the finished run is measured by, once: pattern of the result's file -> what follows `moa`."""
        modules = [f"--import={value}" for option, value in self.options if option == "import"]
        trained = ["--ckpt_path", str(self.folder / CHECKPOINTS / LAST), *modules]
        found = {} if self.test_metric is None else {TEST: ["test", *trained]}
        if self.freeze_gates is not None:
            found[HELD] = ["validate", *trained, "--freeze_gates", str(self.freeze_gates)]
        for test in self.tests:
            more = [*_config_words(test.configs), *self._option_words(test.options)]
            found[test.result] = ["test", *trained, *more, "--run_dir", str(self.folder / test.folder)]
        return found

    def config_arguments(self) -> list[str]:
        """Config files, seed and options."""
        return [*_config_words(self.configs), "--seed_everything", str(self.seed), *self._option_words(self.options)]

    def config_files(self) -> tuple[Config, ...]:
        """All that it is made with, its tests included."""
        return (*self.configs, *(config for test in self.tests for config in test.configs))

    def _option_words(self, options: tuple[tuple[str, str], ...]) -> list[str]:
        return [f"--{option}={self._filled(value)}" for option, value in options]  # a value may start with -

    def _filled(self, value: str) -> str:
        """A value with the seed and the folders of other runs in the place of its placeholders."""
        value = value.replace(SEED, str(self.seed))
        for need in self.needs:
            value = value.replace(need.placeholder, str(need.folder))
        return value

    def fingerprint(self) -> dict[str, str]:
        """What decides the result, by part: order of the fragments, content of each, options, seed, the runs named."""
        contents = {config.name: config.digest for config in self.configs}
        order = " ".join(config.name for config in self.configs)
        needs = {need.placeholder: need.digest for need in self.needs}
        return {"order of configs": order, "seed": str(self.seed), **contents, **dict(self.options), **needs}

    @property
    def digest(self) -> str:
        """Hash of the fingerprint."""
        return hashlib.sha256(json.dumps(self.fingerprint(), sort_keys=True).encode()).hexdigest()


class Claim(NamedTuple):
    """A comparison that the grid makes, declared beforehand."""

    task: str
    name: str
    """the variant that is compared, or the interaction"""
    outcome: Outcome


@dataclass(frozen=True)
class Grid:
    """A checked grid file."""

    name: str
    out: Path
    seeds: Seeds
    baseline: str
    tasks: tuple[GridTask, ...]
    variants: tuple[GridVariant, ...]
    overrides: Mapping[str, str]
    jobs: int
    """runs at a time"""
    tuning: Tuning | None = None
    cluster: Cluster | None = None
    file: Path | None = None
    """that it was read from"""
    interactions: tuple[Interaction, ...] = ()

    @property
    def threads(self) -> int:
        """CPU threads that each run on this machine may use."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.jobs)

    @property
    def modules(self) -> set[str]:
        """Modules that the runs import by an override."""
        options = [self.overrides, *(task.overrides for task in self.tasks), *(v.overrides for v in self.variants)]
        options += [dict(test.options) for task in self.tasks for test in task.tests]
        options += [] if self.tuning is None else [self.tuning.overrides]
        return {part["import"] for part in options if "import" in part}

    @property
    def claims(self) -> int:
        """How many comparisons are in the grid's family."""
        return len(self.family())

    def family(self) -> dict[Claim, dict[str, int]]:
        """The comparisons that are judged together: every variant of every judged task by each of its metrics, but for
        baselines with themselves; the interactions by the task's own metric. Each with the variants whose metrics it
        sums up within a seed, and their weights."""
        found: dict[Claim, dict[str, int]] = {}
        for task in (each for each in self.tasks if each.judged):
            for outcome in task.outcomes:
                for variant in self.variants_of(task):
                    if self.against(variant) != variant.name:
                        found[Claim(task.name, variant.name, outcome)] = {variant.name: 1, self.against(variant): -1}
            for interaction in self.interactions_of(task):
                found[Claim(task.name, interaction.name, task.outcomes[0])] = interaction.weights
        return found

    def interactions_of(self, task: GridTask) -> tuple[Interaction, ...]:
        """Those of which a judged task has all variants."""
        names = {variant.name for variant in self.variants_of(task)}
        return tuple(each for each in self.interactions if task.judged and each.weights.keys() <= names)

    def variants_of(self, task: GridTask) -> tuple[GridVariant, ...]:
        """The variants that a task has."""
        return tuple(each for each in self.variants if task.variants is None or each.name in task.variants)

    def against(self, variant: GridVariant) -> str:
        """The variant that this one is compared with."""
        return variant.against or self.baseline

    def options(self, task: GridTask, variant: GridVariant) -> dict[str, str]:
        """Of a run of one combination: those of the grid, the task and the variant, of which the later win."""
        options = {**self.overrides, **task.overrides, **variant.overrides}
        return {option: value.replace(VARIANT, variant.name) for option, value in options.items()}

    def named_by(self, task: GridTask) -> list[GridTask]:
        """The tasks whose runs name runs of this one."""
        beginning = f"{task.name}/"
        return [
            other
            for other in self.tasks
            if any(
                name.startswith(beginning)
                for variant in self.variants_of(other)
                for value in self.options(other, variant).values()
                for name in OTHER_RUN.findall(value)
            )
        ]

    def run(
        self, task: GridTask, variant: GridVariant, seed: int, more: Mapping[str, str], setting: str | None = None
    ) -> Run:
        """A run of one combination.

        Args:
            more: options that win over those of the grid, the task and the variant.
            setting: what a tuning run tries, None for a final run.
        """
        parts = ("tune", setting, f"seed{seed}") if setting else (f"seed{seed}",)
        options = {**self.options(task, variant), **more}
        named = dict.fromkeys(name for value in options.values() for name in OTHER_RUN.findall(value))
        return Run(
            task=task.name,
            variant=variant.name,
            seed=seed,
            folder=self.out.joinpath(task.name, variant.name, *parts),
            configs=task.configs + variant.configs,
            options=tuple(options.items()),
            metric=task.metric,
            setting=setting,
            test_metric=None if setting else task.test_metric,
            freeze_gates=None if setting else variant.freeze_gates,
            tests=() if setting else tuple(_of_variant(test, variant) for test in task.tests),
            needs=tuple(
                Need(f"{{run:{name}}}", *_path(name, task.name), self.out.joinpath(*_path(name, task.name), *parts))
                for name in named
            ),
        )


def _config_words(configs: tuple[Config, ...]) -> list[str]:
    return [word for config in configs for word in ("-c", str(config.path))]


def _of_variant(test: GridTest, variant: GridVariant) -> GridTest:
    return replace(test, options=tuple((key, value.replace(VARIANT, variant.name)) for key, value in test.options))


def _path(name: str, task: str) -> tuple[str, str]:
    """Task and variant that a placeholder names: {run:variant} of the same task, or {run:task/variant}."""
    other, slash, variant = name.rpartition("/")
    return (other if slash else task), variant
