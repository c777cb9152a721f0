"""From one step to a plan: what fits, how many devices, how long and how much, on a step whose memory is known."""

from dataclasses import replace

import pytest
import torch
from lightning.fabric.utilities.throughput import _CUDA_FLOPS

import data
from moa_lightning.errors import UserError
from moa_lightning.planning import estimate
from moa_lightning.planning.devices import DEVICES, find_device
from moa_lightning.planning.estimate import Planner, answer
from moa_lightning.planning.fake import Measurement
from moa_lightning.planning.settings import Settings

STATE, SAMPLE, STEPS = 24e9, 4e9, 1000


def settings(strategy="fsdp2", replicas=1, batch_size=64, accumulate=2, **changes):
    module = data.TextFiles("-", context_length=128, batch_size=batch_size)
    values = {"max_steps": STEPS, "max_epochs": None, **changes}
    return Settings(lambda: None, module, (), strategy, replicas, False, "bf16-mixed", accumulate, {}, **values)


@pytest.fixture
def executed(monkeypatch):
    """A net of 24 GB of weights, gradients and moments, which takes 4 GB a sample; and what was executed of it."""
    calls = []

    def measure(new_task, batch, datamodule, strategy, devices, precision, accumulate, gpu, clip, **_):
        samples = len(batch()["id"])
        calls.append((devices, samples, accumulate))
        state = STATE / devices if strategy == "fsdp2" else STATE
        parts = {"weights": state / 4, "gradients": state / 4, "buckets": 0, "optimizer": state / 2}
        return Measurement(
            trained=10,
            held=0,
            mixes=0,
            embeddings=0,
            active=10,
            flops_per_sample=1e12,
            activations=SAMPLE * samples,
            peak=state + SAMPLE * samples,
            micro_batch_sent={"all-gather": 3e9},
            step_sent={"all-reduce": 1e9},
            **parts,
        )

    monkeypatch.setattr(estimate, "measure", measure)
    return calls


def planner(device="h100", **options):
    return Planner(settings(**options), DEVICES[device], STEPS)


def test_a_planned_batch_tells_documents_apart_where_the_data_do():
    masked = data.TextFiles("-", context_length=8, batch_size=4, mask_documents=True)
    assert "documents" not in settings().batch(2)
    assert replace(settings(), data=masked).batch(2)["documents"].shape == (2, 8)


def test_numbers_of_devices_are_multiples_of_the_copies(executed):
    plans = list(planner(replicas=4, batch_size=16).numbers())
    assert [plan.devices for plan in plans] == [4, 8]
    with pytest.raises(UserError, match="replicas is 4, which does not divide the 6 devices"):
        planner(replicas=4).plan(6)


def test_time_and_cost_follow_from_flops(executed):
    plan = replace(planner().plan(8), price=2.0)
    step = 128 * 1e12 / (8 * 989.4e12 * 0.4)  # 64 samples a micro-batch, two micro-batches
    assert plan.step_seconds == pytest.approx(step)
    assert plan.device_hours == pytest.approx(8 * step * STEPS / 3600)
    assert plan.cost == pytest.approx(2.0 * plan.device_hours)
    assert replace(plan, price=None).cost is None
    assert (plan.samples, plan.tokens) == (128_000, 128_000 * 128)
    assert plan.sent_per_step == {"all-gather": 6e9, "all-reduce": 1e9}
    assert plan.network_seconds == pytest.approx(7e9 / 450e9)
    assert replace(plan, efficiency=0.2).seconds == pytest.approx(2 * plan.seconds)


def test_smaller_micro_batches_are_the_largest_that_fit(executed):
    plans = planner()
    plan = plans.smaller_batches(plans.plan(2))  # 12 GB and 32 samples: 140 GB
    assert (plan.factor, plan.batch_size, plan.accumulate) == (2, 32, 4)  # 12 + 16 · 4 GB are 76
    assert plan.samples_per_step == 128
    assert plan.fits
    assert len(executed) <= 4


def test_fewer_devices_take_smaller_micro_batches(executed):
    plans = list(planner().numbers())
    assert [(plan.devices, plan.factor, plan.fits) for plan in plans] == [
        (1, 8, True),  # 24 + 8 · 4
        (2, 2, True),
        (4, 1, True),  # 6 + 16 · 4
        (8, 1, True),
    ]
    sentence = answer(plans, planner(), asked=False)
    assert sentence.startswith("4 h100 are needed for the run as configured, or 1 with --data.batch_size 8 ")
    assert "--trainer.accumulate_grad_batches 16." in sentence


def test_copies_that_do_not_fit_do_not_get_better_with_more_devices(executed):
    short = planner("rtx4090", strategy="ddp")
    short.device = replace(short.device, memory=20e9)
    plans = list(short.numbers())
    assert [plan.devices for plan in plans] == [1]
    assert "no number of rtx4090" in answer(plans, short, asked=False)
    assert "fsdp.yaml" in answer(plans, short, asked=False)
    assert "does not fit" in answer([short.plan(1)], short, asked=True)


def test_shards_get_smaller_with_more_devices(executed):
    short = planner("rtx4090")
    short.device = replace(short.device, memory=9e9)
    plans = list(short.numbers())
    # 3 GB and one sample of 4 fit on 8 devices; as configured it is 0.75 GB and two samples on 32
    assert [plan.devices for plan in plans if plan.fits] == [8, 16, 32]
    assert answer(plans, short, asked=False).startswith("32 rtx4090 are needed for the run as configured, or 8 with")


def test_a_batch_that_does_not_divide_is_refused(executed):
    with pytest.raises(UserError, match=r"batch_size is 64.*6 devices"):
        planner().plan(6)


def test_the_length_in_epochs_needs_the_number_of_samples():
    epochs = settings(max_steps=None, max_epochs=3)
    assert epochs.steps(train_samples=64 * 5 + 1) == 3 * 3  # five batches make three steps of two
    with pytest.raises(UserError, match="--train_samples"):
        epochs.steps(None)


@pytest.mark.parametrize(("name", "theirs"), [("a100-80", "a100"), ("a100-40", "a100"), ("h100", "h100 sxm")])
def test_peaks_are_those_that_lightning_knows(name, theirs):
    peaks = _CUDA_FLOPS[theirs]
    device = find_device(name, None, None, None)
    assert (device.peak("bf16-mixed"), device.peak("32-true")) == (peaks[torch.bfloat16], peaks[torch.float32])


def test_any_device_can_be_described():
    device = find_device("mi300x", memory=192, tflops=1300, link=64)
    assert (device.memory, device.peak("bf16-true"), device.link) == (192e9, 1300e12, 64e9)
    assert find_device("h100", memory=94, tflops=None, link=None).memory == 94e9
    with pytest.raises(UserError, match=r"'mi300x' is unknown.*h100.*--memory"):
        find_device("mi300x", None, 1300, None)
