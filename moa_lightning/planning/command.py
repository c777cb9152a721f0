"""The command `moa plan`: its own options, a table, and the answer in a sentence."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli import import_modules, resolve_precision, split_arguments
from ..configs import compose, load_config
from ..errors import UserError
from ..experiments.progress import duration
from ..help import PLAN
from ..mistakes import mistakes, quiet
from ..options import Option
from ..parser import Parser
from .devices import DEVICES, find_device
from .estimate import EFFICIENCY, Plan, Planner, answer, gigabytes
from .settings import Settings, read_settings


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not above 0")
        return value

    number.__name__ = "number" if kind is float else "whole number"  # argparse names the type in its message
    return number


def _own_options() -> Parser:
    parser = Parser("moa plan", add_help=False)
    parser.add_argument("--device", default=None)
    for name in ("--devices", "--train_samples"):
        parser.add_argument(name, type=_positive(int), default=None)
    for name in ("--memory", "--tflops", "--bandwidth", "--price"):
        parser.add_argument(name, type=_positive(float), default=None)
    parser.add_argument("--mfu", type=_positive(float), default=EFFICIENCY)
    parser.add_argument("--json", action="store_true")
    return parser


def plan_command(argv: list[str]) -> int:
    """Run `moa plan`.

    Args:
        argv: the command line after `plan`.

    Raises:
        UserError: a mistake in it.
    """
    if not argv or "--help" in argv or "-h" in argv:
        print(PLAN, end="")
        return 0
    own, rest = _own_options().parse_known_args(argv)
    if own.device is None:
        raise UserError(f"name the kind of device with --device: {', '.join(DEVICES)}, or any other with its figures")
    if own.mfu > 1:
        raise UserError(f"--mfu is {own.mfu:g}; it is a share of the peak, above 0 and at most 1")
    device = find_device(own.device, own.memory, own.tflops, own.bandwidth)
    paths, options = split_arguments(rest)
    fragments = [load_config(path) for path in paths]
    config = compose(fragments)
    options = _precision(config, import_modules(config, options, fragments), device.gpu)
    with mistakes(options, fragments), quiet():
        settings = read_settings(config, options, fragments)
        planner = Planner(settings, device, settings.steps(own.train_samples), own.mfu, own.price)
        if own.devices is None:
            plans = list(planner.numbers())
        else:
            plan = planner.plan(own.devices)
            plans = [planner.smaller_batches(plan) or plan]
    sentence = answer(plans, planner, asked=own.devices is not None)
    if own.json:
        print(json.dumps(as_json(plans, sentence), indent=2))
    else:
        console = Console(soft_wrap=True, highlight=False)
        console.print(table(plans))
        console.print(sentence, markup=False)
    return 0


def _precision(config: dict[str, Any], options: list[Option], gpu: bool) -> list[Option]:
    """`auto`, the default, asks the machine of a fit; here it is bf16-mixed, which every GPU of the table has."""
    given = [option.value for option in options if option.key == "trainer.precision"]
    trainer = config.get("trainer") or {}
    if (given[-1] if given else trainer.get("precision")) in (None, "auto"):
        config["trainer"] = {**trainer, "precision": "bf16-mixed" if gpu else "32-true"}
        return [option for option in options if option.key != "trainer.precision"]
    return resolve_precision(config, options)[0]


Row = tuple[str, Callable[[Plan], Any]]

MEMORY: tuple[Row, ...] = (
    ("weights", lambda plan: plan.measurement.weights),
    ("gradients", lambda plan: plan.measurement.gradients),
    ("DDP buckets", lambda plan: plan.measurement.buckets),
    ("optimiser state", lambda plan: plan.measurement.optimizer),
    ("activations", lambda plan: plan.measurement.activations),
    ("peak", lambda plan: plan.measurement.peak),
)


def table(plans: list[Plan]) -> Table:
    """What does not depend on the number of devices above; below a column for each number, the smallest that fits as
    configured marked."""
    marked = next((plan for plan in plans if plan.fits and plan.factor == 1), None)
    shown = Table(title=_title(plans[0]), title_justify="left", title_style="")
    shown.add_column("devices")
    for plan in plans:
        shown.add_column(f"{plan.devices}{' *' if plan is marked else ''}", justify="right", no_wrap=True)

    def add(name: str, value: Callable[[Plan], str]) -> None:
        shown.add_row(name, *(value(plan) for plan in plans))

    add("samples a device", lambda plan: f"{plan.batch_size // plan.devices:,}")
    add("micro-batches", lambda plan: f"{plan.accumulate:,}")
    shown.add_section()
    for name, value in MEMORY:
        if any(value(plan) for plan in plans):
            add(name, lambda plan, value=value: gigabytes(value(plan)))  # type: ignore[misc]
    add("fits", _fits)
    shown.add_section()
    for kind in sorted({kind for plan in plans for kind in plan.sent_per_step}):
        add(f"{kind} sends", lambda plan, kind=kind: gigabytes(plan.sent_per_step.get(kind, 0)))  # type: ignore[misc]
    if any(plan.network_seconds for plan in plans):
        add("  link seconds", lambda plan: f"{plan.network_seconds or 0:.3g}")
    add("step seconds", lambda plan: f"{plan.step_seconds:.3g}")
    add("time to the end", lambda plan: duration(plan.seconds))
    add("device-hours", lambda plan: f"{plan.device_hours:.3g}")
    if plans[0].price is not None:
        add("cost", lambda plan: f"{plan.cost:,.2f}")
    return shown


def _title(plan: Plan) -> str:
    settings, device, measured = plan.settings, plan.device, plan.measurement
    peak = device.peak(settings.precision) / 1e12
    amount = f"{plan.samples:,} samples" if plan.tokens is None else f"{plan.tokens:,} tokens"
    active = f" ({measured.active:,} active)" if measured.active != measured.trained else ""
    copies = f" in {settings.replicas} copies" if settings.replicas > 1 else ""
    held = f", {measured.held:,} not trained" if measured.held else ""
    return (
        f"{device.name} ({gigabytes(device.memory)}, {peak:,.4g} TFLOP/s), strategy {settings.strategy}{copies}, "
        f"{settings.precision}\n"
        f"{measured.trained:,} trained parameters{active}, {measured.mixes:,} in mixes, "
        f"{measured.embeddings:,} in embeddings{held}\n"
        f"{plan.steps:,} steps of {plan.samples_per_step:,} samples and {plan.flops_per_step:.4g} FLOPs: {amount}\n"
        f"Memory and bytes sent in a step are one device's; times assume an MFU of {plan.efficiency:g}"
    )


def _fits(plan: Plan) -> str:
    if not plan.fits:
        return "no"
    return "yes" if plan.factor == 1 else f"in 1/{plan.factor}"


def as_json(plans: list[Plan], sentence: str) -> dict[str, Any]:
    """Everything that the table shows, in bytes, seconds and FLOPs."""
    first = plans[0]
    settings: Settings = first.settings
    length = settings.tokens_per_sample
    names = ("trained", "active", "held", "mixes", "embeddings")
    return {
        "device": asdict(first.device),
        "strategy": settings.strategy,
        "replicas": settings.replicas,
        "precision": settings.precision,
        "mfu": first.efficiency,
        "parameters": {name: getattr(first.measurement, name) for name in names},
        "flops_per_sample": first.measurement.flops_per_sample,
        "flops_per_token": length and first.measurement.flops_per_sample / length,
        "flops_per_step": first.flops_per_step,
        "steps": first.steps,
        "samples": first.samples,
        "tokens": first.tokens,
        "plans": [
            {
                "devices": plan.devices,
                "batch_size": plan.batch_size,
                "accumulate_grad_batches": plan.accumulate,
                "memory": {name: value(plan) for name, value in MEMORY},
                "fits": plan.fits,
                "as_configured": plan.factor == 1,
                "sent_per_step": plan.sent_per_step,
                "network_seconds": plan.network_seconds,
                "step_seconds": plan.step_seconds,
                "seconds": plan.seconds,
                "device_hours": plan.device_hours,
                "cost": plan.cost,
            }
            for plan in plans
        ],
        "answer": sentence,
    }
