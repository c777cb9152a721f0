"""Throughput: rates by a clock that the test moves."""

import pytest
import torch

from moa_lightning.callbacks import Throughput, throughput

from .test_convergence import TimedTask
from .toy import BATCH, TOKENS, events, fit


def values(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_rates_leave_validation_out(tmp_path, fake_time):
    """A batch takes 2 s, a validation at steps 4 and 8 takes 200; the first logging interval is warm-up."""
    fit(TimedTask(fake_time), tmp_path / "run", [Throughput()])
    steps = [3, 5, 7, 9]
    assert values(tmp_path / "run", "perf/step_seconds") == [(step, 2.0) for step in steps]
    assert values(tmp_path / "run", "perf/tokens_per_second") == [(step, BATCH * TOKENS / 2) for step in steps]
    assert values(tmp_path / "run", "perf/flops_per_second") == [(step, BATCH * 1000 / 2) for step in steps]
    assert not {"perf/mfu", "perf/images_per_second"} & set(events(tmp_path / "run").Tags()["scalars"])


def test_a_step_of_accumulated_batches_takes_their_time_together(tmp_path, fake_time):
    task = TimedTask(fake_time, tokens=False)
    fit(task, tmp_path / "run", [Throughput()], accumulate_grad_batches=3, max_steps=4)
    assert values(tmp_path / "run", "perf/step_seconds") == [(3, 6.0)]
    assert values(tmp_path / "run", "perf/images_per_second") == [(3, BATCH / 2)]


def test_averages_run_over_the_window(tmp_path, fake_time):
    class Slowing(TimedTask):
        def training_step(self, batch, batch_idx):
            self.clock[0] += self.global_step  # the steps take 2, 3, 4, ... seconds
            return super().training_step(batch, batch_idx)

    fit(Slowing(fake_time), tmp_path / "run", [Throughput(window=2)])
    # between logging points: steps 3-4 take 4 + 5 s, 5-6 6 + 7, 7-8 8 + 9, 9-10 10 + 11
    assert values(tmp_path / "run", "perf/step_seconds") == [(3, 4.5), (5, 5.5), (7, 7.5), (9, 9.5)]


def test_mfu_is_the_share_of_the_peak(tmp_path, fake_time, monkeypatch):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 8000.0)
    fit(TimedTask(fake_time), tmp_path / "run", [Throughput()])
    assert [value for _, value in values(tmp_path / "run", "perf/mfu")] == [0.25] * 4


@pytest.mark.parametrize(
    ("name", "precision", "matmul", "peak"),  # dense figures of NVIDIA's data sheets
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", "highest", 989.4e12),
        ("NVIDIA H200", "bf16-true", "highest", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "16-mixed", "highest", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", "highest", 19.5e12),
        ("NVIDIA H200", "32-true", "highest", 67e12),
        ("NVIDIA H200", "32-true", "high", 494.7e12),
        ("NVIDIA H100 NVL", "bf16-mixed", "highest", 989.4e12),
        ("Some card of next year", "bf16-mixed", "highest", None),
    ],
)
def test_peaks_are_those_of_dense_products(name, precision, matmul, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: matmul)
    found = throughput.peak_flops(torch.device("cuda", 0), precision)
    assert found == (None if peak is None else pytest.approx(peak, rel=0.02))


def test_no_peak_is_claimed_for_a_cpu():
    assert throughput.peak_flops(torch.device("cpu"), "32-true") is None
