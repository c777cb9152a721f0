"""MixingTelemetry: the numbers are those of the formula, and watching leaves no trace in the net."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from moa_lightning.activations import pointwise
from moa_lightning.callbacks import MixingTelemetry
from moa_lightning.callbacks.mixing import gate_entropy, gate_saturation, short_names, start_coefficients
from moa_lightning.feedforward import FFNConfig
from moa_lightning.kernels import mix
from moa_lightning.mixing import Mixing

from .toy import ToyTask, events, fit, toy_loader

NAMES = ("identity", "gelu", "relu")


def config(**options):
    return FFNConfig(**({"mixing": "moa", "dictionary": NAMES} | options))


def scalars(folder):
    log = events(folder)
    return {tag: log.Scalars(tag) for tag in log.Tags()["scalars"] if tag.startswith("mixing/")}


def test_names_are_short_and_tell_modules_apart():
    names = [
        "net.blocks.3.mlp.up_mix",
        "net.decoder_blocks.11.mlp.gate_mix",
        "ffn.up_mix",
        "m.layers.1.blocks.0.f.pair_mix",
    ]
    assert list(short_names(names).values()) == ["block03/up", "decoder_block11/gate", "up", "layer01.block00/pair"]
    clash = ["net.student.blocks.0.mlp.up_mix", "net.teacher.blocks.0.mlp.up_mix", "net.teacher.blocks.1.mlp.up_mix"]
    assert list(short_names(clash).values()) == ["student/block00/up", "teacher/block00/up", "teacher/block01/up"]
    hopeless = ["net.blocks.0.mlp.up_mix", "net.blocks.0.other.up_mix"]
    assert list(short_names(hopeless).values()) == hopeless
    moe = [f"net.blocks.0.mlp.{part}.up_mix" for part in ("experts", "shared")]
    for seen in (moe, moe[:1], moe[1:]):  # each has its name whether the other is looked at or not
        assert list(short_names(seen).values()) == [f"block00/{name.split('.')[4]}/up" for name in seen]


@pytest.mark.parametrize(
    ("kind", "gates", "entropy", "saturation"),
    [
        ("sigmoid", [[0.5, 0.5]], 1.0, 0.0),
        ("sigmoid", [[0.25, 0.25]], 0.811278, 0.0),  # H(1/4) in bits
        ("sigmoid", [[0.01, 0.5], [0.99, 0.5]], 0.540397, 0.5),  # H(0.01) = 0.080793
        ("tanh", [[0.0, 0.0]], 1.0, 0.0),
        ("tanh", [[-0.5, 0.5]], 0.811278, 0.0),
        ("tanh", [[0.91, -0.89]], 0.286017, 0.5),  # H(0.045) = 0.264765, H(0.055) = 0.307268
        ("softmax", [[0.25] * 4], 1.0, 0.0),
        ("softmax", [[0.5, 0.5, 0.0, 0.0]], 0.5, 0.0),
        ("softmax", [[0.0, 1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]], 0.5, 0.5),
    ],
)
def test_entropy_and_saturation_of_known_gates(kind, gates, entropy, saturation):
    gates = torch.tensor(gates, dtype=torch.float64)
    assert gate_entropy(gates, kind).mean().item() == pytest.approx(entropy, abs=2e-6)
    assert gate_saturation(gates, kind).item() == pytest.approx(saturation)


def test_the_start_curve_is_what_a_fresh_mix_computes():
    u = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for gate in (None, "sigmoid", "softmax", "tanh"):
        for init in ("identity", "paper"):
            mixing = Mixing(4, NAMES, (1,), gate, init=init).double()
            if mixing.gate_weight is not None:
                torch.nn.init.zeros_(mixing.gate_weight)  # the paper's start but for its small random part
            expected = mix(u, mixing(torch.randn(4, dtype=torch.float64)), NAMES)
            curve = start_coefficients(mixing) @ torch.stack([pointwise(n).function(u) for n in NAMES]).numpy()
            np.testing.assert_allclose(curve, expected.detach().numpy(), atol=1e-12)


def test_scalars_are_the_statistics_of_the_batch(tmp_path):
    """At the first step, with random gates: compared with the formula in float64."""
    task = ToyTask(config())
    for block in task.net.blocks:
        torch.nn.init.normal_(block.mlp.up_mix.gate_weight)
    mix = task.net.blocks[0].mlp.up_mix
    x = next(iter(toy_loader()))["x"].flatten(0, 1).double()
    gates = 1 / (1 + np.exp(-(x @ mix.gate_weight.detach().double().T).numpy()))
    coefficients = mix.base.detach().double().numpy() + gates - 0.5
    entropy = -(gates * np.log2(gates) + (1 - gates) * np.log2(1 - gates)).mean()
    saturation = np.mean((gates < 0.05) | (gates > 0.95))

    fit(task, tmp_path / "run", [MixingTelemetry()], max_steps=1, log_every_n_steps=1)
    seen = {tag: points[0].value for tag, points in scalars(tmp_path / "run").items()}
    assert len(seen) == 2 * (3 * 3 + 2)
    for k, name in enumerate(NAMES):
        assert seen[f"mixing/block00/up/alpha/{name}"] == float(name == "gelu")
        assert seen[f"mixing/block00/up/mean/{name}"] == pytest.approx(coefficients[:, k].mean(), rel=1e-5, abs=1e-6)
        assert seen[f"mixing/block00/up/std/{name}"] == pytest.approx(coefficients[:, k].std(), rel=1e-5)
    assert seen["mixing/block00/up/gate_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert seen["mixing/block00/up/gate_saturation"] == pytest.approx(saturation)


def test_la_logs_its_alphas_as_they_are_trained(tmp_path):
    task = ToyTask(config(mixing="la"))
    seen = {}

    def remember():
        seen[task.global_step] = task.net.blocks[1].mlp.up_mix.base.tolist()

    task.on_train_batch_start = lambda *_: remember()
    fit(task, tmp_path / "run", [MixingTelemetry()], max_steps=4)
    found = scalars(tmp_path / "run")
    assert set(found) == {f"mixing/{layer}/up/alpha/{n}" for layer in ("block00", "block01") for n in NAMES}
    for k, name in enumerate(NAMES):
        points = [(e.step, e.value) for e in found[f"mixing/block01/up/alpha/{name}"]]
        assert points == [(step, seen[step][k]) for step in (1, 3)]  # logging steps 2 and 4 on Lightning's axis


def images(folder, tag):
    return [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events(folder).Images(tag)]


@pytest.mark.parametrize("branches", ["one", "both", "pairs"])
@pytest.mark.parametrize("mixing", ["la", "moa"])
def test_pictures_come_at_their_steps_and_at_the_end(tmp_path, mixing, branches):
    task = ToyTask(config(mixing=mixing, form="gated", branches=branches))
    fit(task, tmp_path / "run", [MixingTelemetry(every_n_steps=4)])
    name = "pairs" if branches == "pairs" else "curves"
    found = images(tmp_path / "run", f"mixing/{name}")
    assert [step for step, _ in found] == [3, 7, 9]
    assert all(picture.shape[1] <= 1200 and picture.shape[2] == 3 and picture.std() > 0 for _, picture in found)
    files = sorted((tmp_path / "run" / "pictures").iterdir())
    assert [file.name for file in files] == [f"mixing-{name}-step{step:06d}.png" for step in (4, 8, 10)]
    np.testing.assert_array_equal(np.asarray(Image.open(files[0])), found[0][1])


def test_nothing_is_logged_for_fixed_activations_and_teachers(tmp_path):
    fit(ToyTask(FFNConfig()), tmp_path / "fixed", [MixingTelemetry(every_n_steps=2)])
    assert not scalars(tmp_path / "fixed")
    assert not (tmp_path / "fixed" / "pictures").exists()
    fit(ToyTask(config(), teacher=True), tmp_path / "teacher", [MixingTelemetry()], max_steps=2)
    assert {tag.split("/")[1] for tag in scalars(tmp_path / "teacher")} == {"block00", "block01"}


def test_watching_changes_nothing(tmp_path):
    torch.manual_seed(3)
    plain = ToyTask(config(form="gated", branches="both"))
    torch.manual_seed(3)
    watched = ToyTask(config(form="gated", branches="both"))
    fit(plain, tmp_path / "a", [])
    fit(watched, tmp_path / "b", [MixingTelemetry(every_n_steps=3)])
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), watched.parameters(), strict=True))
    assert not any(module._forward_pre_hooks for module in watched.modules())


def test_hooks_do_not_survive_an_error(tmp_path):
    task = ToyTask(config())
    task.on_before_optimizer_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(task, tmp_path / "run", [MixingTelemetry()], log_every_n_steps=1)
    assert not any(module._forward_pre_hooks for module in task.modules())


def test_only_the_last_of_accumulated_batches_is_seen(tmp_path):
    task = ToyTask(config(mixing="moa"))
    for block in task.net.blocks:
        torch.nn.init.normal_(block.mlp.up_mix.gate_weight)
    weight = task.net.blocks[0].mlp.up_mix.gate_weight.detach().clone()
    batches = [batch["x"].flatten(0, 1) for batch in toy_loader()]
    expected = [torch.sigmoid(x @ weight[0]).std(correction=0).item() for x in batches[:3]]
    fit(task, tmp_path / "run", [MixingTelemetry()], accumulate_grad_batches=3, max_steps=1, log_every_n_steps=1)
    assert not math.isclose(expected[0], expected[2], rel_tol=1e-3)
    point = scalars(tmp_path / "run")["mixing/block00/up/std/identity"][0]
    assert point.value == pytest.approx(expected[2], rel=1e-5)


def test_compiled_blocks_are_seen_at_the_pace_of_the_pictures(tmp_path):
    task = ToyTask(config())
    for block in task.net.blocks:
        block.compile(backend="eager")
    fit(task, tmp_path / "run", [MixingTelemetry(every_n_steps=4)])
    found = scalars(tmp_path / "run")
    assert [e.step for e in found["mixing/block00/up/std/gelu"]] == [3, 7, 9]
    assert [step for step, _ in images(tmp_path / "run", "mixing/curves")] == [3, 7, 9]
