"""Speed of training: tokens or images a second, seconds a step, and the share of the device's peak (MFU).

MFU follows Chowdhery et al., "PaLM", appendix B (arXiv 2204.02311): matrix-product FLOPs that the model needs, however
they are computed (recomputation does not count), over the peak of the device at this precision, without sparsity.
Averages run over the logging intervals of a window, on a clock that stands still during validation; the interval up to
the first logging point (allocation, compilation) never enters. The device is waited for at logging points only.
"""

from collections import deque
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.trainer.states import TrainerFn

from .common import TrainingClock, data_replicas, is_logging_step, log_scalars, synchronize, watched

# Peaks that Lightning's table lacks, of dense products (NVIDIA H200 data sheet; the sheet's tensor figures are with
# sparsity, twice these).
_PEAKS: dict[str, dict[Any, float]] = {
    "H200": {
        torch.bfloat16: 989.4e12,
        torch.float16: 989.4e12,
        "tf32": 494.7e12,
        torch.float32: 66.9e12,
        torch.float64: 33.5e12,
    }
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak dense FLOP/s of one device at a Trainer's precision ("bf16-mixed", ...); None where it is not known."""
    if device.type != "cuda":
        return None
    dtypes = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = dtypes.get(precision.split("-")[0], torch.float32)
    name = torch.cuda.get_device_name(device)
    for part, peaks in _PEAKS.items():
        if part in name:
            rounded = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
            return peaks["tf32" if rounded else dtype]
    peak = get_available_flops(device, dtype)
    # Lightning's figures for this one are those of a pair of cards
    return peak / 2 if peak is not None and "H100 NVL" in name else peak


class _Point(NamedTuple):
    """Totals at a logging point, over all processes."""

    seconds: float
    steps: int
    samples: int
    tokens: int


class Throughput(L.Callback):
    """Logs perf/step_seconds, perf/tokens_per_second or perf/images_per_second, and perf/mfu.

    Where the device's peak is not known (every CPU), perf/flops_per_second stands in for perf/mfu. Rates are over all
    processes; MFU is per device.

    Args:
        window: logging intervals that an average runs over; at first it runs over those there are.
    """

    def __init__(self, window: int = 5) -> None:
        self.window = window

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock = TrainingClock()
        self._samples = self._tokens = 0
        self._points: deque[_Point] = deque(maxlen=self.window + 1)
        peak = peak_flops(trainer.strategy.root_device, str(trainer.precision))
        self._peak = None if peak is None else peak * trainer.world_size

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._clock.start()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            synchronize(trainer)
            self._clock.pause()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task, replicas = watched(pl_module), data_replicas(trainer)
        self._samples += task.samples_per_batch(batch) * replicas
        self._tokens += (task.tokens_per_batch(batch) or 0) * replicas
        if is_logging_step(trainer):
            synchronize(trainer)
            self._points.append(_Point(self._clock.seconds, trainer.global_step, self._samples, self._tokens))
            if len(self._points) > 1:
                flops = task.flops_per_sample()  # asked here because a task may learn its view sizes from the batches
                log_scalars(trainer, self._measures(self._points[0], self._points[-1], flops))

    def _measures(self, first: _Point, last: _Point, flops_per_sample: float) -> dict[str, float]:
        seconds, samples = last.seconds - first.seconds, last.samples - first.samples
        flops_per_second = samples * flops_per_sample / seconds
        measures = {"perf/step_seconds": seconds / (last.steps - first.steps)}
        if last.tokens > 0:
            measures["perf/tokens_per_second"] = (last.tokens - first.tokens) / seconds
        else:
            measures["perf/images_per_second"] = samples / seconds
        if self._peak is not None:
            measures["perf/mfu"] = flops_per_second / self._peak
        else:
            measures["perf/flops_per_second"] = flops_per_second
        return measures
