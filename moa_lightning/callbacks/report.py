"""What a run says about itself: a few lines before it starts, and what came out at its end."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table
from torch import nn

from .. import environment
from ..experiments.progress import duration
from ..feedforward import FeedForward, FFNConfig
from .common import TrainingClock


class RunReport(L.Callback):
    """Prints task and net, data, length, device and folder at the start; metrics and the TensorBoard line at the end.

    Args:
        run_dir: the run's folder; None for a trial run.
        notes: further lines for the start.
        modules: the user's own, which a run that goes on must name again.
        console: where it is written; None: the process's standard output.
    """

    def __init__(
        self, run_dir: Path | None, notes: list[str], modules: Sequence[str] = (), console: Console | None = None
    ) -> None:
        self.run_dir, self.notes, self.modules = run_dir, notes, modules
        self.console = console or Console(soft_wrap=True, highlight=False)
        self.trained = False

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trained, self.clock = True, TrainingClock()
        self.clock.start()
        data = trainer.datamodule  # type: ignore[attr-defined]
        lines = {
            "task": f"{type(pl_module).__name__}, {describe_net(pl_module)}",
            "data": describe_data(data.describe()),
            "length": describe_length(trainer, data.batch_size),
            "device": describe_device(trainer),
        }
        chosen: dict[str, Any] = getattr(pl_module, "chosen", {})
        if chosen:
            lines["chosen"] = (
                ", ".join(f"{name} {value:.6g}" for name, value in chosen.items()) + " to fit data and steps"
            )
        if self.run_dir is not None:
            lines["folder"] = str(self.run_dir)
            start = {**environment.describe(trainer.strategy.root_device), "run": describe_device(trainer)}
            facts = {"data": data.describe(), "net": describe_net(pl_module)}
            environment.record(self.run_dir, {**start, **facts}, goes_on=trainer.global_step > 0)
        for name, text in lines.items():
            self._print(f"{name:<8}{text}")
        for start in getattr(pl_module, "starts", []) if trainer.global_step == 0 else []:
            self._print(f"{'start':<8}{start}")
        for note in self.notes:
            self._print(f"{'note':<8}{note}")

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.trained:
            self._print(f"nothing to do: step {trainer.global_step} is reached; raise --trainer.max_steps to go on")
            return
        metrics = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        self._print(f"finished step {trainer.global_step} after {duration(self.clock.seconds)}")
        if metrics:
            self.console.print(metrics_table(metrics))
        if self.run_dir is not None:
            self._print(f"tensorboard --logdir {shlex.quote(str(self.run_dir))}")

    @rank_zero_only
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """After Ctrl-C or SIGTERM: how to go on."""
        if self.trained and self.run_dir is not None and isinstance(exception, KeyboardInterrupt | SIGTERMException):
            again = f"moa fit --run_dir {shlex.quote(str(self.run_dir))} --ckpt_path last"
            again += "".join(f" --import {shlex.quote(name)}" for name in self.modules)
            self._print(f"stopped after step {trainer.global_step}; the last checkpoint goes on with: {again}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)


def describe_net(module: L.LightningModule) -> str:
    """Parameters, and the feed-forward layers by what they compute."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    kinds = Counter(describe_ffn(layer.config) for layer in student_layers(module))
    layers = "; ".join(f"{count} feed-forward layers: {kind}" for kind, count in kinds.items())
    return f"{trainable:,} trained parameters, {layers or 'no feed-forward layers of ours'}"


def student_layers(module: nn.Module) -> list[FeedForward]:
    """Feed-forward layers that are trained (an averaged teacher's are not)."""
    layers = [layer for layer in module.modules() if isinstance(layer, FeedForward)]
    return [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]


def describe_ffn(config: FFNConfig) -> str:
    """moa gated both, 7 activations from silu, sigmoid gates."""
    others = {"attention gate": config.attention_gate, "pointwise norm": config.pointwise_norm}
    places = "".join(f", {kind} {place}" for place, kind in others.items() if kind != "none")
    if config.mixing == "fixed":
        return f"{config.form} {config.activation}{places}"
    branches = f" {config.branches}" if config.gated else ""
    start = f" from {config.activation}" if config.init == "identity" else ", the paper's start"
    start = f" from the mixes of {config.start_from}" if config.start_from else start
    control = "" if config.gates == "trained" else f"{config.gates} "
    gates = f", {control}{config.gate} gates" if config.mixing == "moa" else ""
    return f"{config.mixing} {config.form}{branches}, {len(config.dictionary)} activations{start}{gates}{places}"


def describe_data(facts: dict[str, Any]) -> str:
    """One line of what a data module says about itself."""
    name, source = facts.get("data", "data"), facts.get("source", "")
    splits = [f"{facts[f'{split}_samples']:,} {split}" for split in ("train", "val", "test")]
    kept = f", training on {facts['training_images']}" if "training_images" in facts else ""
    held_out = f", held-out images under {facts['corruption']}" if "corruption" in facts else ""
    judged = f", {facts['test_images']}" if "test_images" in facts else ""
    sha256 = str(facts.get("sha256", "unknown"))[:12]
    return f"{name} {source}: {', '.join(splits)} samples{kept}{held_out}{judged}, sha256 {sha256}"


def describe_length(trainer: L.Trainer, batch_size: int) -> str:
    """Steps and samples a step; where a resumed run goes on."""
    total = trainer.estimated_stepping_batches
    steps = "no limit of steps" if total == float("inf") else f"{total:,} steps"
    start = f", going on after step {trainer.global_step:,}" if trainer.global_step else ""
    return f"{steps} of {batch_size * trainer.accumulate_grad_batches:,} samples{start}"


def describe_device(trainer: L.Trainer) -> str:
    """Devices, how they share the work, and the precision."""
    kind = type(trainer.strategy).__name__.removesuffix("Strategy")
    return f"{trainer.world_size} x {trainer.strategy.root_device.type}, {kind}, precision {trainer.precision}"


def metrics_table(metrics: dict[str, float]) -> Table:
    """Metrics of a validation or test."""
    table = Table("metric", "value")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.5g}")
    return table
