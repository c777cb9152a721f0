"""From the measurement of one step to a plan: does it fit, how long, how much; and how many devices it takes.

A step takes FLOPs / (devices · peak · efficiency): the efficiency is the MFU that `perf/mfu` logs (PaLM, arXiv
2204.02311, appendix B), so it includes whatever keeps the devices from their peak, the network too. It is the one
number here that is assumed and not derived. Reported MFUs of transformer pre-training on such devices lie between 0.3
and 0.5; 0.4 is the default.

Where a run does not fit, the same optimiser batch in smaller micro-batches may: a factor k divides data.batch_size and
multiplies trainer.accumulate_grad_batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UserError
from .devices import Device
from .fake import Measurement, measure
from .settings import Settings

EFFICIENCY = 0.4
MOST_DEVICES = 4096
ALWAYS_LISTED = 8  # numbers of devices up to this one are listed even where fewer are enough


@dataclass(frozen=True)
class Plan:
    """A run on a number of devices. Memory in bytes a device."""

    devices: int
    device: Device
    settings: Settings
    measurement: Measurement
    steps: int
    efficiency: float
    price: float | None
    """of one device for an hour"""
    factor: int = 1
    """by how much the micro-batches are smaller than configured"""

    @property
    def batch_size(self) -> int:
        """Samples of a micro-batch over all devices (data.batch_size)."""
        return self.settings.data.batch_size // self.factor

    @property
    def accumulate(self) -> int:
        """Micro-batches of an optimiser step."""
        return self.settings.accumulate * self.factor

    @property
    def fits(self) -> bool:
        return self.measurement.peak <= self.device.memory

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulate

    @property
    def flops_per_step(self) -> float:
        return self.measurement.flops_per_sample * self.samples_per_step

    @property
    def samples(self) -> int:
        """Of the whole run."""
        return self.steps * self.samples_per_step

    @property
    def tokens(self) -> int | None:
        """Of the whole run; None where the task does not count in tokens."""
        length = self.settings.tokens_per_sample
        return None if length is None else self.samples * length

    @property
    def sent_per_step(self) -> dict[str, int]:
        """Bytes that each device sends for an optimiser step, by collective."""
        once, often = self.measurement.step_sent, self.measurement.micro_batch_sent
        return {kind: once.get(kind, 0) + self.accumulate * often.get(kind, 0) for kind in {**once, **often}}

    @property
    def network_seconds(self) -> float | None:
        """Time of that at the full speed of the link, None where it is not known."""
        return None if self.device.link is None else sum(self.sent_per_step.values()) / self.device.link

    @property
    def step_seconds(self) -> float:
        peak = self.device.peak(self.settings.precision)
        return self.flops_per_step / (self.devices * peak * self.efficiency)

    @property
    def seconds(self) -> float:
        """Of the whole run, validation not counted."""
        return self.steps * self.step_seconds

    @property
    def device_hours(self) -> float:
        return self.devices * self.seconds / 3600

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.price * self.device_hours


@dataclass
class Planner:
    """Makes plans of one run for any number of one kind of device.

    Args:
        steps: optimiser steps of the run.
        efficiency: MFU.
        price: of one device for an hour.
    """

    settings: Settings
    device: Device
    steps: int
    efficiency: float = EFFICIENCY
    price: float | None = None

    def plan(self, devices: int, factor: int = 1) -> Plan:
        """The run on so many devices.

        Raises:
            UserError: the batch does not divide among them, or the strategy is one device's.
        """
        batch_size = self.settings.data.batch_size // factor
        if devices % self.settings.replicas:
            raise UserError(f"replicas is {self.settings.replicas}, which does not divide the {devices} devices")
        if devices < 1 or batch_size % devices:
            raise UserError(
                f"data.batch_size is {batch_size}, the number of samples over all devices, and does not divide among "
                f"{devices} devices: choose a multiple"
            )
        measurement = self._measure(devices, batch_size // devices, self.settings.accumulate * factor)
        return Plan(devices, self.device, self.settings, measurement, self.steps, self.efficiency, self.price, factor)

    def _measure(self, devices: int, samples: int, accumulate: int) -> Measurement:
        settings = self.settings
        strategy = "ddp" if settings.strategy == "auto" and devices > 1 else settings.strategy
        return measure(
            settings.new_task,
            lambda: settings.batch(samples),
            settings.data,
            strategy,
            devices,
            settings.precision,
            accumulate,
            self.device.gpu,
            settings.clip,
            replicas=settings.replicas,
            low_precision_parameters=settings.low_precision_parameters,
        )

    def smaller_batches(self, plan: Plan) -> Plan | None:
        """The plan with the largest micro-batches that fit; None where not even one sample a device does."""
        if plan.fits:
            return plan
        if plan.measurement.state > self.device.memory:
            return None
        samples = plan.batch_size // plan.devices
        sizes = [n for n in range(1, samples) if samples % n == 0]
        least = self.plan(plan.devices, samples)
        if not least.fits:
            return None
        # What is held at a moment grows by so much a sample, and the peak is the largest of several moments. So it
        # lies below the straight line between two sizes: what fits by the line fits, and a larger size may too.
        room = (self.device.memory - least.measurement.peak) / (plan.measurement.peak - least.measurement.peak)
        certain = max(n for n in sizes if n - 1 <= room * (samples - 1))
        best = least
        for n in sizes[sizes.index(certain) :]:
            trial = self.plan(plan.devices, samples // n)
            if not trial.fits:
                break
            best = trial
        return best

    def numbers(self) -> Iterator[Plan]:
        """The run on 1, 2, 4, ... devices a copy of the net, each with micro-batches that fit or else as configured,
        until it fits as configured, until the batch does not divide further, or until more devices cannot help."""
        devices = self.settings.replicas
        while devices <= MOST_DEVICES and self.settings.data.batch_size % devices == 0:
            plan = self.plan(devices)
            yield self.smaller_batches(plan) or plan
            sharded = self.settings.strategy == "fsdp2"
            hopeless = plan.measurement.state > self.device.memory and not sharded
            if hopeless or (plan.fits and devices >= ALWAYS_LISTED):
                return
            devices *= 2


def answer(plans: list[Plan], planner: Planner, asked: bool) -> str:
    """The sentence that a plan comes down to.

    Args:
        plans: of increasing numbers of devices, with micro-batches that fit where there are such.
        asked: one number of devices was given.
    """
    kind, memory = planner.device.name, gigabytes(planner.device.memory)
    if asked:
        plan = plans[0]
        needed = f"{gigabytes(plan.measurement.peak)} of the {memory} of each of {plan.devices} {kind}"
        if not plan.fits:
            return f"It does not fit: one step needs {needed}, {_way_out(plan, planner)}."
        if plan.factor > 1:
            return f"It fits with {_smaller(plan)}: one step then needs {needed}; as configured it does not."
        return f"It fits: one step needs {needed}."
    whole = next((plan for plan in plans if plan.fits and plan.factor == 1), None)
    split = next((plan for plan in plans if plan.fits and plan.factor > 1), None)
    if whole is None and split is None:
        return f"It fits on no number of {kind} up to {plans[-1].devices}: {_way_out(plans[-1], planner)}."
    parts = []
    if whole is not None:
        parts.append(f"{whole.devices} {kind} {'is' if whole.devices == 1 else 'are'} needed for the run as configured")
    if split is not None and (whole is None or split.devices < whole.devices):
        parts.append(f"{split.devices} with {_smaller(split)}")
    return ", or ".join(parts) + "."


def _smaller(plan: Plan) -> str:
    return f"--data.batch_size {plan.batch_size} --trainer.accumulate_grad_batches {plan.accumulate}"


def _way_out(plan: Plan, planner: Planner) -> str:
    if plan.measurement.state <= planner.device.memory:
        return "even with one sample a device; take devices with more memory or a smaller net"
    state = f"weights, gradients and optimiser alone are {gigabytes(plan.measurement.state)}"
    if planner.settings.strategy == "fsdp2":
        return f"{state}; take more devices"
    return f"{state}; shard them over several devices with -c configs/trainer/fsdp.yaml"


def gigabytes(count: float) -> str:
    """Bytes with three digits: 12.3 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 100 * size else f"{count / size:,.0f} {unit}"
    return f"{count / 1e3:.3g} kB"
