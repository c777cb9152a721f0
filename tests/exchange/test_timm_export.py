"""moa export --to timm: the line that it prints loads the encoder with the run's features, by timm alone or with
`import moa_lightning`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from moa_lightning import FFNConfig, UserError
from moa_lightning.cli import main
from moa_lightning.models import GPTConfig
from tasks import DINO, MAE, ImageClassification, LanguageModeling, Task
from tests.models.families import IMAGE, SMALL, images
from tests.models.nets import fragment, shake

NAMES = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_siglip_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
]
SIZES = {"image_size": IMAGE, "channels": 3, "seed": 0}


def run_of(kind: type[Task], name: str, ffn: FFNConfig) -> Task:
    if kind is MAE:
        task: Task = MAE(name, SMALL, ffn, decoder_dim=16, decoder_depth=1, decoder_heads=2, **SIZES)
    else:
        task = DINO(name, SMALL, ffn, out_dim=8, head_hidden_dim=8, head_bottleneck_dim=4, **SIZES)
    task.configure_model()
    shake(task.net)
    return task.eval()


def classifier_of(name: str, ffn: FFNConfig, pool: str) -> Task:
    task = ImageClassification(name, SMALL, ffn, pool=pool, num_classes=7, drop_path_rate=0.1, **SIZES)
    task.configure_model()
    shake(task.net)
    return task.eval()


def export(task: Task, folder: Path) -> tuple[int, Path]:
    path, out = folder / "a.ckpt", folder / "encoder.safetensors"
    state = {f"net.{key}": value for key, value in task.net.state_dict().items()}
    torch.save({"state_dict": state, "global_step": 7, "hyper_parameters": dict(task.hparams)}, path)
    return main(["export", "--ckpt_path", str(path), "--out", str(out), "--to", "timm"]), out


def loaded(line: str) -> nn.Module:
    """What the printed line of Python makes."""
    names = {"timm": timm}
    *before, call = line.split("; ")
    for statement in before:
        exec(statement, names)
    return eval(call, names).eval()


@pytest.mark.parametrize("kind", [MAE, DINO])
@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_encoder_is_timms_own(name: str, kind: type[Task], tmp_path, capsys) -> None:
    gated = "eva02" in name
    task = run_of(kind, name, FFNConfig(form="gated", activation="silu") if gated else FFNConfig())
    code, _ = export(task, tmp_path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert code == 0
    assert line.startswith(f'timm.create_model("{name}", checkpoint_path=')
    net = loaded(line)
    assert not any("moa_lightning" in type(m).__module__ for m in net.modules())
    with torch.no_grad():
        expected = task.features(images())
        if kind is MAE and "distilled" in name:
            expected = task.net.encoder.forward_features(images())
            assert torch.allclose(net.forward_features(images()), expected, atol=1e-6)
        else:
            assert (net(images()) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("ffn", ["la", "moa", "moa_gated_pairs", "relu2", "xielu"])
@pytest.mark.parametrize("kind", [MAE, DINO])
def test_other_encoders_are_loaded_under_a_registered_name(kind: type[Task], ffn: str, tmp_path, capsys) -> None:
    task = run_of(kind, NAMES[0], fragment(ffn))
    code, out = export(task, tmp_path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert (code, line) == (0, f"import moa_lightning; timm.create_model(\"moa_vit\", file='{out}')")
    with torch.no_grad():
        expected = task.features(images())
        assert (loaded(line)(images()) - expected).norm() <= 1e-6 * expected.norm()
    classifier = timm.create_model("moa_vit", file=str(out), num_classes=5)
    assert classifier(images()).shape == (2, 5)
    encoder = {key: value for key, value in classifier.state_dict().items() if not key.startswith("head")}
    assert all(torch.equal(value, loaded(line).state_dict()[key]) for key, value in encoder.items())


@pytest.mark.parametrize(
    ("name", "pool"), [(NAMES[0], "avg"), (NAMES[0], "token"), (NAMES[1], "token"), (NAMES[3], "avg")]
)
def test_a_fixed_classifier_is_timms_own(name: str, pool: str, tmp_path, capsys) -> None:
    gated = "eva02" in name
    task = classifier_of(name, FFNConfig(form="gated", activation="silu") if gated else FFNConfig(), pool)
    code, _ = export(task, tmp_path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert code == 0
    assert line.startswith(f'timm.create_model("{name}", checkpoint_path=')
    with torch.no_grad():
        expected = task(images())
        assert expected.shape == (2, 7)
        assert (loaded(line)(images()) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("ffn", ["la", "moa"])
def test_other_classifiers_are_loaded_under_a_registered_name(ffn: str, tmp_path, capsys) -> None:
    task = classifier_of(NAMES[0], fragment(ffn), "avg")
    code, out = export(task, tmp_path)
    line = capsys.readouterr().out.splitlines()[-1]
    assert (code, line) == (0, f"import moa_lightning; timm.create_model(\"moa_vit\", file='{out}')")
    with torch.no_grad():
        logits, features = task(images()), task.features(images())
        assert (loaded(line)(images()) - logits).norm() <= 1e-6 * logits.norm()
        bare = timm.create_model("moa_vit", file=str(out), num_classes=0)
        assert (bare.eval()(images()) - features).norm() <= 1e-6 * features.norm()
    other = timm.create_model("moa_vit", file=str(out), num_classes=5)
    assert other(images()).shape == (2, 5)
    assert torch.equal(other.state_dict()["fc_norm.weight"], task.net.state_dict()["vit.fc_norm.weight"])


def test_the_name_is_known_in_either_order_of_imports(tmp_path: Path) -> None:
    """Another timm stands in for the real one, whose import takes seconds."""
    assert timm.is_model("moa_vit"), "timm first"
    (tmp_path / "timm/models").mkdir(parents=True)
    (tmp_path / "timm/__init__.py").touch()
    (tmp_path / "timm/models/__init__.py").write_text("def register_model(f): print('registered', f.__name__)")
    script = (
        "import sys, moa_lightning; print('torch' in sys.modules, 'timm' in sys.modules, flush=True); "
        "import importlib.util; importlib.util.find_spec('timm'); import timm; print(timm.__file__)"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": path},
    )
    expected = ["False False", "registered moa_vit", str(tmp_path / "timm/__init__.py")]
    assert (run.returncode, run.stdout.splitlines()) == (0, expected), run.stderr


def test_mistakes_are_one_sentence(tmp_path, capsys) -> None:
    text = LanguageModeling(GPTConfig(depth=1, dim=16, num_heads=2), vocab_size=11, context_length=8, seed=0)
    text.configure_model()
    assert export(text, tmp_path)[0] == 2
    assert "no encoder for timm" in capsys.readouterr().err
    (tmp_path / "a.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"moa export --to timm writes one"):
        timm.create_model("moa_vit", file=str(tmp_path / "a.safetensors"))
    with pytest.raises(UserError, match="needs file, or backbone"):
        timm.create_model("moa_vit")
    with pytest.raises(UserError, match="no pre-trained weights"):
        timm.create_model("moa_vit", pretrained=True, backbone=NAMES[0])
