"""A config of a stranger: nothing outside of the project's packages is imported, no file makes the parser explode."""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import tasks
from moa_lightning.configs import MOST_BYTES, load_config
from moa_lightning.errors import UserError
from moa_lightning.models import GPTConfig
from tests.cli.conftest import MAE, Moa

FIT = f"{MAE} --trainer.max_steps 1 --run_dir run"
OUTSIDE = "is outside of moa_lightning, tasks, data, lightning, torch,"
LAMBDA = "lightning.pytorch.callbacks.LambdaCallback"


@pytest.fixture(autouse=True)
def canary(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `evil` that could be imported from the working folder and would leave a file; none may be left."""
    Path("evil.py").write_text(
        "from pathlib import Path\nPath('canary').touch()\nimport lightning as L\n"
        "class Sly(L.Callback): pass\ndef run(*_): Path('canary').touch()\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    sys.modules.pop("evil", None)
    yield Path("canary")
    assert not Path("canary").exists()
    assert "evil" not in sys.modules
    assert not Path("run").exists()


def hook(name: str, function: str) -> str:
    return f"trainer: {{callbacks: [{{class_path: {LAMBDA}, init_args: {{{name}: {function}}}}}]}}"


FILES = {
    "model: {class_path: os.system, init_args: {command: touch canary}}": "model.class_path 'os.system'",
    "model: os.system": "'os.system'",
    "data: {class_path: subprocess.Popen, init_args: {args: [touch, canary]}}": "data.class_path 'subprocess.Popen'",
    "data: {class_path: evil.Sly}": "data.class_path 'evil.Sly'",
    "data: {init_args: {transform: {class_path: evil.Sly}}}": "data.init_args.transform.class_path 'evil.Sly'",
    "trainer: {callbacks: [{class_path: evil.Sly}]}": "trainer.callbacks.0.class_path 'evil.Sly'",
    "trainer: {callbacks: [evil.Sly]}": "trainer.callbacks: 'evil.Sly'",
    "trainer: {callbacks: evil.Sly}": "trainer.callbacks: 'evil.Sly'",
    hook("on_fit_start", "evil.run"): "'evil.run'",
    hook("on_fit_start", "os.system"): "'os.system'",
    hook("setup", "torch.hub.load"): "'torch.hub.load' loads code",
    hook("setup", "torch.os.system"): "system' is outside",
    "trainer: {logger: {class_path: evil.Sly}}": "trainer.logger.class_path 'evil.Sly'",
    "trainer: {logger: [{class_path: evil.Sly}]}": "trainer.logger.0.class_path 'evil.Sly'",
    "trainer: {strategy: {class_path: evil.Sly}}": "trainer.strategy.class_path 'evil.Sly'",
    "trainer: {plugins: [{class_path: evil.Sly}]}": "trainer.plugins.0.class_path 'evil.Sly'",
    "trainer: {profiler: {class_path: evil.Sly}}": "trainer.profiler.class_path 'evil.Sly'",
    "import: [evil]": "asks for the module 'evil', and importing it runs its code; if you trust it, add --import evil",
    "import: evil": "import must be a list of modules",
    "trainer: !!python/object/apply:os.system [touch canary]": "not valid YAML: could not determine a constructor",
    "trainer: !!python/name:os.system": "not valid YAML",
    "trainer: !!python/module:evil": "not valid YAML",
}


@pytest.mark.parametrize("content", FILES)
def test_a_config_imports_nothing_from_outside(moa: Moa, content: str) -> None:
    Path("stranger.yaml").write_text(content)
    outcome = moa(f"{FIT} -c stranger.yaml")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert FILES[content] in outcome.err


OPTIONS = [
    "--model evil.Sly",
    "--model os.system",
    "--data evil.Sly",
    "--data.transform evil.Sly",
    "--trainer.callbacks+ evil.Sly",
    "--trainer.callbacks+=evil.Sly",
    '--trainer.callbacks [{"class_path":"evil.Sly"}]',
    '--trainer.logger {"class_path":"evil.Sly"}',
    "--trainer.strategy.class_path evil.Sly",
    f"--trainer.callbacks+ {LAMBDA} --trainer.callbacks.on_fit_start evil.run",
    "--model.help evil.Sly",
]


@pytest.mark.parametrize("options", OPTIONS)
def test_options_import_nothing_from_outside_either(moa: Moa, options: str) -> None:
    outcome = moa(f"{FIT} {options}")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1), outcome
    assert "evil" in outcome.err or "os.system" in outcome.err


ELSEWHERE = {
    "backbone: 'hf-hub:stranger/vit'": "backbone 'hf-hub:stranger/vit' lies elsewhere, and nothing is fetched",
    "backbone: 'hf_hub:stranger/vit'": "backbone 'hf_hub:stranger/vit' lies elsewhere",
    "backbone: 'local-dir:evil'": "backbone 'local-dir:evil' lies elsewhere",
    "backbone_args: {pretrained: true}": "backbone_args.pretrained reads weights of unknown origin",
    "backbone_args: {pretrained_cfg: {url: 'http://127.0.0.1:9/x'}}": "backbone_args.pretrained_cfg reads weights",
    "backbone_args: {checkpoint_path: evil.pth}": "backbone_args.checkpoint_path reads weights of unknown origin",
}


@pytest.mark.parametrize("task", ["MAE", "DINO"])
@pytest.mark.parametrize("arguments", ELSEWHERE)
def test_no_backbone_is_fetched_or_unpickled(monkeypatch: pytest.MonkeyPatch, task: str, arguments: str) -> None:
    def reached(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", reached)
    sizes = {"image_size": 32, "channels": 3, "seed": 0}
    sizes |= {"out_dim": 64, "teacher_momentum": 0.9, "teacher_temperature": 0.04} if task == "DINO" else {}
    given = {"backbone": "vit_tiny_patch16_224", **yaml.safe_load(arguments), **sizes}
    with pytest.raises(UserError) as caught:
        getattr(tasks, task)(**given).configure_model()
    assert ELSEWHERE[arguments] in str(caught.value)


def test_a_stranger_s_run_folder_imports_nothing(moa: Moa) -> None:
    Path("theirs/checkpoints").mkdir(parents=True)
    Path("theirs/checkpoints/last.ckpt").write_bytes(b"")
    Path("theirs/config.yaml").write_text("import: [evil]\nmodel: {class_path: tasks.MAE}\n")
    outcome = moa("validate --ckpt_path theirs/checkpoints/last.ckpt")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "add --import evil" in outcome.err


class Touch:
    """Unpickled, it leaves the canary."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("canary",)


LOAD = "lightning.fabric.utilities.cloud_io._load"
UNPICKLE = f"{{class_path: {LOAD}, init_args: {{path_or_url: bomb.pt, weights_only: false}}}}"


@pytest.fixture
def theirs() -> Path:
    """The folder of a run with a checkpoint that loads, and a file that must not be unpickled."""
    task = tasks.LanguageModeling(
        GPTConfig(depth=1, dim=8, num_heads=1), vocab_size=257, context_length=8, seed=0
    ).eval()
    task.configure_model()
    state = {f"net.{name}": tensor for name, tensor in task.net.state_dict().items()}
    Path("theirs/checkpoints").mkdir(parents=True)
    content = {"state_dict": state, "global_step": 1, "hyper_parameters": dict(task.hparams)}
    torch.save(content, "theirs/checkpoints/last.ckpt")
    torch.save(Touch(), "bomb.pt")
    return Path("theirs/config.yaml")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (UNPICKLE, f"data '{LOAD}' is unknown"),
        ("{class_path: torchvision.datasets.MNIST, init_args: {root: ., download: true}}", "data 'torchvision."),
        (f"{{class_path: data.Mixture, init_args: {{sources: {{a: {UNPICKLE}}}}}}}", f"data.sources.a '{LOAD}'"),
        ("{class_path: data.TextFiles, init_args: {old: 1}}", "data.old is no option of TextFiles"),
        ("{class_path: data.Mixture, init_args: {}}", "'sources'; correct it"),
        ("null", "data is 'None'; give the name of a class"),
    ],
)
def test_a_strangers_run_folder_calls_no_function(moa: Moa, theirs: Path, data: str, words: str) -> None:
    theirs.write_text(f"model: {{class_path: tasks.LanguageModeling}}\ndata: {data}\n")
    outcome = moa("generate --prompt a --ckpt_path theirs/checkpoints/last.ckpt")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert words in outcome.err


@pytest.mark.parametrize(
    "trainer",
    [
        f"callbacks: [{{class_path: {LAMBDA}, init_args: {{setup: {UNPICKLE}}}}}]",
        f"callbacks: [{{class_path: {LAMBDA}, init_args: {{setup: '{UNPICKLE}'}}}}]",
        f"strategy: {{class_path: DDPStrategy, init_args: {{ddp_comm_hook: {UNPICKLE}}}}}",
    ],
)
def test_the_parser_calls_no_function_either(moa: Moa, theirs: Path, trainer: str) -> None:
    theirs.write_text(
        f"model: {{class_path: tasks.LanguageModeling}}\ndata: {{class_path: data.TextFiles}}\ntrainer: {{{trainer}}}\n"
    )
    outcome = moa("validate --ckpt_path theirs/checkpoints/last.ckpt")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1), outcome
    assert f"class_path '{LOAD}' is no task, data module" in outcome.err


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGE = "m0: &m0 {k: v}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 100,000 values once its aliases are filled in"),
        (MERGE, "more than 100,000 values"),
        ("a: &a [*a]\n", "an alias contains itself"),
        ("a: &a {b: *a}\n", "an alias contains itself"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: " + "{a: " * 5000, "nested too deeply"),
        ("# " + "x" * MOST_BYTES, "larger than 1,000,000 bytes"),
        ("a: 2026-99-99\n", "not valid YAML: month must be in 1..12"),
        ("a: 2026-11-22\n", "a is a date; if text is meant"),
        ("a: !!binary aGk=\n", "a is a bytes"),
        ("a: {b: !!set {c, d}}\n", "a.b is a set"),
        ("on: 1\n", "the first level has the key True, true or false; write it in quotation marks"),
        ("a: {[1, 2]: 3}\n", "not valid YAML"),
        ("a: 1" + "0" * 5000, "not valid YAML"),
        ("a: \x00\n", "not valid YAML"),
    ],
)
def test_yaml_that_would_break_the_parser(content: str, message: str) -> None:
    Path("bomb.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_config("bomb.yaml")
    assert "'bomb.yaml'" in str(caught.value)


def test_aliases_as_people_use_them_stay() -> None:
    Path("fine.yaml").write_text("a: &a {b: [1, 2], c: 3}\nd: *a\ne: {<<: *a, c: 4}\n")
    assert load_config("fine.yaml").content["e"] == {"b": [1, 2], "c": 4}


def test_a_name_cannot_write_to_the_terminal(moa: Moa) -> None:
    outcome = moa("fit -c \x1b[31mred\x07.yaml")
    assert outcome.code == 2
    assert "\x1b" not in outcome.err
    assert "\\x1b[31mred\\x07.yaml" in outcome.err
