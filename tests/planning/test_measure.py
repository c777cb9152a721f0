"""What is measured without content is what real nets have and do, and quickly measured."""

import resource
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tasks
from moa_lightning import FFNConfig
from moa_lightning.models import GPTConfig
from moa_lightning.planning.fake import gpu_norms, measure
from tests.planning.nets import BATCH, TASKS, Sizes, built, planned
from tests.runs.fits import ROOT, make_task

FRAGMENTS = sorted(path.stem for path in (ROOT / "configs" / "ffn").glob("*.yaml"))


def test_bf16_true_halves_what_a_device_holds():
    full, half = (planned("mae", "gelu", precision=precision) for precision in ("32-true", "bf16-true"))
    assert half.weights == pytest.approx(full.weights / 2, rel=0.02)
    assert half.gradients == full.gradients / 2
    assert half.peak < 0.65 * full.peak  # the loss is float32 in both


@pytest.mark.parametrize("ffn", ["gelu", "la_gated_both", "moa_gated_pairs"])
@pytest.mark.parametrize("task", TASKS)
def test_parameters_are_those_of_the_real_net(task, ffn):
    plan, module = planned(task, ffn), built(task, ffn)
    trained = {name: p for name, p in module.net.named_parameters() if p.requires_grad}

    def count(*endings: str) -> int:
        return sum(p.numel() for name, p in trained.items() if name.endswith(endings))

    everything = sum(p.numel() for p in module.parameters())
    assert (plan.trained, plan.held) == (count(""), everything - count(""))
    assert plan.mixes == count("mix.base", "mix.gate_weight")
    patches = ("patch_embed.proj.weight", "patch_embed.proj.bias", "_token", "pos_embed")
    assert plan.embeddings == count("embed.weight") if task == "language" else count(*patches)
    assert plan.gradients == 4 * plan.trained
    assert plan.weights == 4 * everything + sum(b.nbytes for b in module.buffers())
    # two moments, and the number of the step for every parameter
    assert plan.optimizer == 8 * plan.trained + 4 * len(trained)


def test_tied_embeddings_are_counted_once():
    def task() -> tasks.Task:
        return tasks.LanguageModeling(GPTConfig(1, 32, 2, tie_embeddings=True), vocab_size=256)

    sizes = Sizes("language")
    plan = measure(task, sizes.batch, sizes, "auto", 1)
    # embedding; norms of block and net; attention with its norms; feed-forward with its biases
    assert plan.trained == 256 * 32 + 3 * 32 + (4 * 32 * 32 + 2 * 16) + (2 * 32 * 128 + 128 + 32)
    assert plan.active == plan.trained  # no experts
    assert plan.gradients == 4 * plan.trained


@pytest.mark.parametrize("ffn", ["gelu", "swiglu", "moa"])
@pytest.mark.parametrize("task", TASKS)
def test_flops_are_those_that_torch_counts(task, ffn):
    module = built(task, ffn)
    module.log = lambda *args, **kwargs: None
    if task == "dino":
        module.teacher_temperature = lambda: 0.05  # asks the Trainer for its progress
    with FlopCounterMode(display=False) as counter:
        module.training_step(Sizes(task).batch(), 0).backward()
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for operation, flops in counts.items() if "attention" in operation)
    flops = planned(task, ffn).flops_per_sample * BATCH
    if task == "language":
        # causal attention counts half, and its recomputation in the backward pass (torch's 2.5) does not
        assert flops == counter.get_total_flops() - attention + attention / 3.5 * 3 / 2
    else:  # recomputation, and the gradient of the images that nobody computes
        assert flops == pytest.approx(counter.get_total_flops(), rel=0.025)


def test_a_step_with_hidden_patches_can_be_planned():
    sizes, plain = Sizes("dino"), planned("dino", "moa")
    how = {"strategy": "ddp", "devices": 2, "clip": {"gradient_clip_val": 1.0}}
    plan = measure(lambda: make_task("dino", "moa", "masked"), sizes.batch, sizes, **how)
    head = (32 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 16 + 16 * 48
    assert plan.trained == plain.trained + head + 32  # the mask token
    assert plan.held == plain.held + head
    matrices = 32 * 64 + 64 * 64 + 64 * 16 + 16 * 48
    patches = 2 * 49 * 0.5 * 0.3  # expected of an image
    assert plan.flops_per_sample == pytest.approx(plain.flops_per_sample + 4 * 2 * matrices * patches)


@pytest.mark.parametrize("ffn", FRAGMENTS)
def test_every_feed_forward_layer_can_be_planned(ffn):
    plan = planned("language", ffn, strategy="fsdp2", devices=2)
    assert plan.peak > plan.state > 0
    fixed = yaml.safe_load(Path(ROOT, f"configs/ffn/{ffn}.yaml").read_text())["model"]["init_args"]["ffn"]["mixing"]
    assert (plan.mixes == 0) == (fixed == "fixed")


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer norm", "rms norm"])
def test_the_norms_of_a_gpu_are_the_same_norms_in_float32(norm):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = norm(x)
    with gpu_norms():
        torch.testing.assert_close(norm(x), expected)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = norm(x.bfloat16())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, norm(x.bfloat16().float()))


def test_autocast_of_a_gpu_keeps_more():
    cpu, gpu = (planned("mae", "gelu", precision="bf16-mixed", gpu=gpu).activations for gpu in (False, True))
    tokens, removed = BATCH * 50, BATCH * 37
    # the decoder's stream is bfloat16: three norms of width 32 read it in float32 and keep two bytes a number more, two
    # of them for removed patches alone
    assert gpu - cpu == pytest.approx(2 * (tokens + 2 * removed) * 32, rel=0.1)


@pytest.mark.parametrize("task", ["language", "mae"])
def test_recomputation_keeps_less(task):
    every, products, nothing = (
        planned(task, "moa", recompute, precision="bf16-mixed", gpu=True).activations
        for recompute in (False, "selective", True)
    )
    assert 0 < nothing < products < every


def test_two_billion_parameters_take_seconds_and_no_memory():
    def task() -> tasks.Task:
        return tasks.LanguageModeling(GPTConfig(24, 2560, 20), FFNConfig(mixing="moa"), vocab_size=50304)

    sizes, before, start = Sizes("language"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    plan = measure(task, sizes.batch, sizes, "fsdp2", 8, "bf16-mixed", gpu=True)
    assert plan.trained > 2e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; the weights are 8.5 GB
    assert time.process_time() - start < 60
