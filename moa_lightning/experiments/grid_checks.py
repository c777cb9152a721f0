"""What can only be seen of the parts of a grid together, before anything is trained: names that do not exist or stand
twice, options that are set in two places, runs that would wait for one another, seeds with two uses.
"""

from collections.abc import Mapping

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import OTHER_RUN, Grid, GridTask, GridVariant, Interaction

BUDGET_OPTIONS = ("trainer.max_steps", "trainer.max_epochs")


def check_grid(grid: Grid, where: str) -> None:
    """UserError for the first mistake; `where` names the file."""
    names = [variant.name for variant in grid.variants]
    for baseline in (grid.baseline, *(variant.against for variant in grid.variants if variant.against)):
        if baseline not in names:
            raise UserError(f"{where}: baseline {baseline!r} is not a variant; choose one of {', '.join(names)}.")
    for interaction in grid.interactions:
        _check_interaction(grid, interaction, names)
    tasks = [task.name for task in grid.tasks]
    if twice := sorted({name for name in tasks if tasks.count(name) > 1}):
        raise UserError(f"{where}: two tasks would be called {', '.join(twice)}: rename a task or an axis value.")
    if grid.tuning is None and any(task.tune for task in grid.tasks):
        raise UserError(f"{where}: a task has `tune`, but the grid has none that names the `seeds` to tune on.")
    if grid.tuning is not None:
        both = sorted(set(grid.tuning.seeds) & set(grid.seeds.first(grid.seeds.most)))
        if both:
            given = ", ".join(map(str, both))
            raise UserError(f"{where}: seeds {given} would be used for tuning and for final runs; tune on others.")
    for task in grid.tasks:
        _check_variants(grid, task)
        if grid.seeds.most > len(grid.seeds.pilot) and task.judged and task.effect is None:
            raise UserError(
                f"task {task.name} has no `effect`, the smallest difference in {task.final_metric} that matters: "
                "it decides the number of seeds after the pilot."
            )
        for variant in grid.variants_of(task):
            options = grid.options(task, variant)
            set_twice = [option for option in BUDGET_OPTIONS if option in options]
            if task.budget is not None and set_twice:
                raise UserError(f"task {task.name} has a budget and the option {set_twice[0]}; remove one of them.")
            _check_other_runs(grid, task, variant, options)
            if clash := sorted(set(task.tune) & set(variant.overrides)):
                raise UserError(f"variant {variant.name} sets {clash[0]}, which is tuned; remove it from one place.")
        own = {**task.overrides, **(grid.tuning.overrides if grid.tuning is not None else {})}
        if clash := sorted(set(task.tune) & set(own)):
            raise UserError(
                f"task {task.name} sets {clash[0]} (itself, by an axis, or by the overrides of tuning), which is "
                "tuned; remove it from one place (`tune: {}` in a task: nothing is tuned there)."
            )
    if grid.tuning is not None and not any(task.tune for task in grid.tasks):
        raise UserError(f"{where}: tune has seeds, but no task has options to tune; give `options`, or remove tune.")


def _check_interaction(grid: Grid, interaction: Interaction, names: list[str]) -> None:
    where = f"interaction {interaction.name}"
    if interaction.name in names or sum(each.name == interaction.name for each in grid.interactions) > 1:
        raise UserError(f"{where}: a variant or another interaction is called so; choose another name.")
    if unknown := [name for name in interaction.weights if name not in names]:
        raise UserError(f"{where}: {unknown[0]!r} is not a variant; choose from {', '.join(names)}.")
    if not any(interaction in grid.interactions_of(task) for task in grid.tasks):
        raise UserError(f"{where}: no judged task has all of {', '.join(interaction.weights)}; add them to one.")


def _check_variants(grid: Grid, task: GridTask) -> None:
    """A task has variants of the grid, and with each the one that it is compared with."""
    names, own = [variant.name for variant in grid.variants], [variant.name for variant in grid.variants_of(task)]
    if unknown := [name for name in task.variants or () if name not in names]:
        raise UserError(f"task {task.name} has variant {unknown[0]!r}; choose from {', '.join(names)}.")
    for variant in grid.variants_of(task) if task.judged else ():
        if grid.against(variant) not in own:
            raise UserError(
                f"task {task.name} has variant {variant.name}, but not {grid.against(variant)}, with which it is "
                "compared; add that one, or say `judged: false`."
            )


def _check_other_runs(grid: Grid, task: GridTask, variant: GridVariant, options: Mapping[str, str]) -> None:
    """What {run:variant} and {run:task/variant} name must come before the one that names it: no run waits for ever."""
    of_task = {each.name: [v.name for v in grid.variants_of(each)] for each in grid.tasks}
    tasks, variants = list(of_task), of_task[task.name]
    before = tasks[: tasks.index(task.name)], variants[: variants.index(variant.name)]
    for option, value in options.items():
        for name in OTHER_RUN.findall(value):
            other, slash, run = name.rpartition("/")
            known = other in before[0] and run in of_task[other] if slash else run in before[1]
            if not known:
                raise UserError(
                    f"variant {variant.name}: {option} is {value}, but '{name}' is neither a variant listed before it "
                    "nor task/variant of a task listed before (one of an axis is called task-value); correct it."
                )
            if slash and task.tune:
                raise UserError(f"task {task.name} is tuned, so {option} cannot name a run of another task: {value}.")
