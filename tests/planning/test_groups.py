"""What is planned for DDP and FSDP2 is what the processes of a real group hold; what they send adds up."""

import pytest

import tasks
from moa_lightning.models import GPTConfig
from moa_lightning.planning.fake import measure
from tests.planning.group import run_group
from tests.planning.nets import BATCH, TASKS, Sizes
from tests.runs.fits import make_task


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    return run_group(tmp_path_factory.mktemp("group"))


def planned(task, strategy, devices, **options):
    sizes = Sizes(task, BATCH // devices)
    clip = {"gradient_clip_val": 1.0}
    return measure(lambda: make_task(task, "gelu"), sizes.batch, sizes, strategy, devices, clip=clip, **options)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_process_holds_what_was_planned(group, strategy, task):
    plan, real = planned(task, strategy, 2), group[f"{strategy} {task}"]
    assert plan.weights == real["weights"]
    assert plan.optimizer == real["optimizer"]
    if task != "dino":  # which takes the last layer's gradients away at first
        assert plan.gradients == real["gradients"]
    assert plan.peak == pytest.approx(real["peak"], rel=0.02)


def test_a_process_with_a_copy_of_its_own_holds_what_was_planned(group):
    plan, real = planned("language", "fsdp2", 2, replicas=2), group["copies language"]
    assert (plan.weights, plan.gradients, plan.optimizer) == (real["weights"], real["gradients"], real["optimizer"])
    assert plan.weights > 1.9 * planned("language", "fsdp2", 2).weights
    assert plan.peak == pytest.approx(real["peak"], rel=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_shards_of_two_are_halves(task):
    one, two = planned(task, "auto", 1), planned(task, "fsdp2", 2)
    assert two.state == pytest.approx(one.state / 2, rel=0.05)
    assert one.trained == two.trained


def test_a_device_of_eight_never_holds_the_whole_net():
    def task() -> tasks.Task:
        return tasks.LanguageModeling(GPTConfig(depth=8, dim=136, num_heads=4))

    sizes = Sizes("language", samples=1)
    plan = measure(task, sizes.batch, sizes, "fsdp2", 8, clip={"gradient_clip_val": 1.0})
    # its shards, what one sample keeps, and a few of eight blocks at a time: less than all weights alone
    assert plan.peak < plan.state + plan.activations + 4 * plan.trained


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_what_is_sent(devices):
    share = (devices - 1) / devices
    ddp, fsdp = (planned("language", strategy, devices) for strategy in ("ddp", "fsdp2"))
    gradients = 4 * ddp.trained
    assert ddp.step_sent == {"all-reduce": pytest.approx(2 * share * gradients)}
    assert ddp.micro_batch_sent == {}
    sent = fsdp.micro_batch_sent
    # gathered for the forward and again for the backward pass, in rows that divide among the devices
    assert sent["all-gather"] == pytest.approx(2 * share * gradients, rel=0.03)
    assert sent["reduce-scatter"] == pytest.approx(share * gradients, rel=0.03)


@pytest.mark.parametrize(("devices", "replicas"), [(4, 2), (8, 2), (8, 4)])
def test_parameters_travel_inside_a_copy_and_gradients_between_copies_too(devices, replicas):
    shards = devices // replicas
    plan = planned("language", "fsdp2", devices, replicas=replicas)
    gradients, inside, between = 4 * plan.trained, (shards - 1) / shards, (replicas - 1) / replicas
    assert plan.micro_batch_sent == {
        "all-gather": pytest.approx(2 * inside * gradients, rel=0.03),
        "reduce-scatter": pytest.approx(inside * gradients, rel=0.03),
        "all-reduce": pytest.approx(2 * between * gradients / shards, rel=0.03),
    }
    assert plan.state == pytest.approx(planned("language", "fsdp2", shards).state, rel=0.01)


def test_blocks_gathered_in_low_precision_send_half():
    whole, half = (
        planned("language", "fsdp2", 4, precision="bf16-mixed", low_precision_parameters=low) for low in (False, True)
    )
    blocks = 1 - 2 * 256 * 32 / whole.trained  # all but the embedding and the head
    expected = (1 - blocks / 2) * whole.micro_batch_sent["all-gather"]
    assert half.micro_batch_sent["all-gather"] == pytest.approx(expected, rel=0.05)


def test_dino_averages_its_centre_over_the_devices():
    sent = planned("dino", "ddp", 2).micro_batch_sent
    assert sent == {"all-reduce": 64 * 4 + 4}  # a number for each prototype, and one count
