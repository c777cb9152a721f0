"""Which runs a grid comes to, as far as the results on disk decide it.

First each variant's options are tuned: the same values and the same seeds for all variants of a task, the best mean on
the validation split is chosen. Its final runs have other seeds. Where the grid names a pilot, the spread of the paired
differences over the pilot's seeds says how many seeds the task gets (power.py): all variants of a task get the same
ones, as the comparison is paired. The pilot's seeds are judged with the others. That could bias a test, as their spread
has decided the number; here it is pooled over all variants, and simulated grids make no more false claims than promised
(tests/experiments/test_pilot.py). Nothing of this is stored: it follows from the finished runs, so a killed grid
comes to the same runs again.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Budget, Grid, GridTask, GridVariant, Run
from moa_lightning.experiments.sizes import Size

Measure = Callable[[GridTask, GridVariant, Mapping[str, str]], Size]
Value = Callable[[Run], float | None]  # the deciding metric of a finished run, None before it has finished


@dataclass(frozen=True)
class Choice:
    """What tuning has chosen for a variant on a task."""

    options: Mapping[str, str]
    mean: float
    """of the validation metric over the tuning seeds; NaN where no setting came to a finite value"""
    tried: Mapping[str, float]
    """setting -> that mean"""
    edges: tuple[str, ...]
    """options whose chosen value is the first or last of its list: better ones may lie beyond"""


@dataclass(frozen=True)
class Plan:
    """What a pilot says about the number of seeds."""

    sd: float
    """of a paired difference"""
    needed: int
    """seeds that show the task's effect with the wanted power; the grid's `most` may be fewer"""


@dataclass
class Schedule:
    """The runs of a grid.

    Args:
        measure: parameters and FLOPs of a combination with more options, asked where a budget depends on them.
        value: looks up the result of a run: of tuning runs the validation metric, of final runs the one that decides.
    """

    grid: Grid
    measure: Measure
    value: Value

    def tuning_runs(self) -> list[Run]:
        """All runs that try a setting, seeds outermost."""
        if self.grid.tuning is None:
            return []
        return [
            self.tuning_run(task, variant, setting, seed)
            for seed in self.grid.tuning.seeds
            for task in self.grid.tasks
            for variant in self.grid.variants_of(task)
            for setting in settings(task)
        ]

    def tuning_run(self, task: GridTask, variant: GridVariant, setting: Mapping[str, str], seed: int) -> Run:
        """The run that tries one setting of the tuned options."""
        assert self.grid.tuning is not None
        own = {**self.grid.tuning.overrides, **setting}
        length = self.length(task, variant, self.grid.tuning.budget or task.budget, own)
        run = self.grid.run(task, variant, seed, {**length, **own}, setting_name(setting))
        others = [self.tuning_run(task, self._variant(need.variant), setting, seed) for need in run.needs]
        return _on_top_of(run, others)  # a task that is tuned names its own runs only

    def choice(self, task: GridTask, variant: GridVariant) -> Choice | None:
        """The best setting, None while runs that decide it are missing."""
        if not task.tune or self.grid.tuning is None:
            return Choice({}, math.nan, {}, ())
        means: dict[str, float] = {}
        for setting in settings(task):
            values = [self.value(self.tuning_run(task, variant, setting, seed)) for seed in self.grid.tuning.seeds]
            if None in values:
                return None
            means[setting_name(setting)] = fmean(value for value in values if value is not None)
        sign = 1 if task.mode == "min" else -1
        best = min(settings(task), key=lambda setting: _finite_first(sign * means[setting_name(setting)]))
        edges = [option for option, value in best.items() if value in (task.tune[option][0], task.tune[option][-1])]
        return Choice(best, means[setting_name(best)], means, tuple(edges))

    def final_run(self, task: GridTask, variant: GridVariant, seed: int) -> Run | None:
        """A run that the comparison is about, None while its options are not chosen."""
        choice = self.choice(task, variant)
        if choice is None:
            return None
        more = {**self.length(task, variant, task.budget, choice.options), **choice.options}
        run = self.grid.run(task, variant, seed, more)
        tasks = {task.name: task for task in self.grid.tasks}
        others = [self.final_run(tasks[need.task], self._variant(need.variant), seed) for need in run.needs]
        known = [other for other in others if other is not None]
        return _on_top_of(run, known) if len(known) == len(others) else None

    def _variant(self, name: str) -> GridVariant:
        return next(variant for variant in self.grid.variants if variant.name == name)

    def length(
        self, task: GridTask, variant: GridVariant, budget: Budget | None, more: Mapping[str, str]
    ) -> dict[str, str]:
        """The options that make a run with `more` options as long as its budget says."""
        if budget is None:
            return {}
        steps = budget_steps(budget, self.measure, task, variant, more)
        rhythm = (
            {} if budget.validations is None else {"trainer.val_check_interval": str(-(-steps // budget.validations))}
        )
        return {"trainer.max_steps": str(steps), **rhythm}

    def seeds(self, task: GridTask) -> tuple[int, ...]:
        """Seeds of a task's final runs; the pilot's until the pilot has finished. A task that names this one's runs has
        no seeds beside them."""
        own = self._own_seeds(task)
        return max([own, *(self.seeds(other) for other in self.grid.named_by(task))], key=len)

    def _own_seeds(self, task: GridTask) -> tuple[int, ...]:
        seeds = self.grid.seeds
        if seeds.most == len(seeds.pilot) or not task.judged:
            return seeds.pilot
        metrics = self._pilot_metrics(task)
        if metrics is None:
            return seeds.pilot
        plan = self._plan(task, metrics)
        return seeds.pilot if plan is None else seeds.first(min(max(plan.needed, len(seeds.pilot)), seeds.most))

    def plan(self, task: GridTask) -> Plan | None:
        """What the pilot says about the number of seeds; None without a pilot, or where it has not finished or tells
        nothing (fewer than two variants with finite values, no spread), or nothing is judged."""
        seeds = self.grid.seeds
        if seeds.most == len(seeds.pilot) or not task.judged or (metrics := self._pilot_metrics(task)) is None:
            return None
        return self._plan(task, metrics)

    def _plan(self, task: GridTask, metrics: Mapping[str, Mapping[int, float]]) -> Plan | None:
        """Seeds that show a difference of the task's effect, by the spread in the pilot; variants that diverge on a
        seed tell nothing about it."""
        from moa_lightning.experiments.power import MOST_SEEDS, pilot_of_grid, seeds_after_pilot  # scipy takes a second

        finite = {name: found for name, found in metrics.items() if all(map(math.isfinite, found.values()))}
        if len(finite) < 2 or (pilot := pilot_of_grid(finite)).sd == 0:
            return None
        assert task.effect is not None  # grid_file.py asks for it of judged tasks
        try:
            needed = seeds_after_pilot(task.effect, pilot, target=self.grid.seeds.power, comparisons=self.grid.claims)
        except UserError:  # beyond all bounds
            needed = MOST_SEEDS
        return Plan(pilot.sd, needed)

    def _pilot_metrics(self, task: GridTask) -> dict[str, dict[int, float]] | None:
        """variant -> seed -> metric of the pilot's runs, None before all of them have finished."""
        metrics: dict[str, dict[int, float]] = {}
        for variant in self.grid.variants_of(task):
            values = {seed: self._final_value(task, variant, seed) for seed in self.grid.seeds.pilot}
            if None in values.values():
                return None
            metrics[variant.name] = {seed: value for seed, value in values.items() if value is not None}
        return metrics

    def _final_value(self, task: GridTask, variant: GridVariant, seed: int) -> float | None:
        run = self.final_run(task, variant, seed)
        return None if run is None else self.value(run)

    def final_runs(self) -> list[Run]:
        """The final runs that are decided so far, seeds outermost: a grid that stops half-way has compared all
        variants on the first seeds."""
        wanted = {task.name: self.seeds(task) for task in self.grid.tasks}
        order = dict.fromkeys(itertools.chain.from_iterable(wanted.values()))
        runs = [
            self.final_run(task, variant, seed)
            for seed in order
            for task in self.grid.tasks
            if seed in wanted[task.name]
            for variant in self.grid.variants_of(task)
        ]
        return [run for run in runs if run is not None]

    def runs(self) -> list[Run]:
        """All runs that are decided so far, in the order in which they are started."""
        return [*self.tuning_runs(), *self.final_runs()]

    def total(self) -> int:
        """How many runs there will be, as far as can be told now."""
        finals = sum(len(self.seeds(task)) * len(self.grid.variants_of(task)) for task in self.grid.tasks)
        return len(self.tuning_runs()) + finals


def settings(task: GridTask) -> list[dict[str, str]]:
    """All combinations of the values of the tuned options; none where nothing is tuned."""
    if not task.tune:
        return []
    return [dict(zip(task.tune, values, strict=True)) for values in itertools.product(*task.tune.values())]


def setting_name(setting: Mapping[str, str]) -> str:
    """lr=0.002,weight_decay=0.1: names a folder too."""
    text = ",".join(f"{option.rpartition('.')[2]}={value}" for option, value in setting.items())
    return re.sub(r"[^A-Za-z0-9._+=,-]", "_", text)


def _on_top_of(run: Run, others: Sequence[Run]) -> Run:
    """A run with the digests of those that it names."""
    needs = (need._replace(digest=other.digest) for need, other in zip(run.needs, others, strict=True))
    return replace(run, needs=tuple(needs))


def budget_steps(
    budget: Budget, measure: Measure, task: GridTask, variant: GridVariant, more: Mapping[str, str]
) -> int:
    """Optimiser steps that come nearest to a budget, at least 1, of a run with `more` options.

    steps · samples a step = samples;  · tokens a sample = tokens;  · FLOPs a sample (forward and backward) = flops;
    tokens per parameter counts all trained parameters, embeddings too.
    """
    if budget.unit == "steps":
        return max(1, round(budget.amount))
    size = measure(task, variant, more)
    return max(1, round(budget.amount / size.per_step(budget.unit)))


def _finite_first(value: float) -> float:
    return value if math.isfinite(value) else math.inf
