"""The joint task: apart it is its two tasks, tied it shares tensors, and a checkpoint gives the same net back."""

import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

import data
from moa_lightning import FFNConfig, UserError
from moa_lightning.checkpoints import RunCheckpointIO
from moa_lightning.exchange.export import export
from moa_lightning.masking import IBOTConfig
from moa_lightning.optim import OptimizerConfig
from tasks import Joint, Task
from tests.models.nets import fragment
from tests.tasks.conftest import data_for, task, trainer

STEPS = 4
RATES = {"vision": OptimizerConfig(lr=2e-3, warmup_steps=2), "language": OptimizerConfig(lr=5e-3, weight_decay=0.3)}


class Curves(L.Callback):
    """train/loss... of every step, and the metrics of the last validation."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.last: dict[str, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        names = [name for name in trainer.callback_metrics if name.startswith("train/loss")]
        self.steps.append({name: float(trainer.callback_metrics[name]) for name in names})

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.last = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}

    def curve(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def fit(module: Task, datamodule: Any, folder: Path, **options: Any) -> Curves:
    curves = Curves()
    schedule = {"val_check_interval": STEPS, "check_val_every_n_epoch": None, **options}
    L.seed_everything(0, verbose=False)
    run = trainer(STEPS, folder, callbacks=[curves], plugins=[RunCheckpointIO()], **schedule)
    run.fit(module, datamodule=datamodule)
    module.trainer = run
    return curves


def joint(vision: str = "mae", ffn: str = "moa", language: dict[str, Any] | None = None, **options: Any) -> Joint:
    parts = task(vision, ffn, optimizer=RATES["vision"]), task("language", ffn, optimizer=RATES["language"])
    if language:
        parts = (parts[0], task("language", ffn, optimizer=RATES["language"], **language))
    return Joint(*parts, **options)  # type: ignore[arg-type]


def both(vision: str, text: Path, *ratio: int) -> data.Joint:
    return data.Joint(data_for(vision, text), data_for("language", text), *ratio)


@pytest.fixture(scope="module")
def language_alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Curves]:
    module = task("language", "moa", optimizer=RATES["language"])
    return module, fit(module, data_for("language", text), tmp_path_factory.mktemp("alone"))


MASKED: dict[str, Any] = {"ibot": IBOTConfig(), "layer_decay": 0.9, "final_weight_decay": 0.8}


@pytest.mark.parametrize(("vision", "options"), [("mae", {}), ("dino", {}), ("dino", MASKED)])
def test_with_nothing_tied_it_is_the_two_runs(vision: str, options, text: Path, tmp_path: Path, language_alone) -> None:
    """To the bit: losses, validations and, at the end, weights; the teacher's and the centre among them."""
    module = task(vision, "moa", optimizer=RATES["vision"], **options)
    alone = {"vision": (module, fit(module, data_for(vision, text), tmp_path)), "language": language_alone}
    first: Any = task(vision, "moa", optimizer=RATES["vision"], **options)
    second: Any = task("language", "moa", optimizer=RATES["language"])
    together = Joint(first, second, vision_weight=1.0, language_weight=1.0)
    curves = fit(together, both(vision, text), tmp_path)
    for domain, (own, expected) in alone.items():
        assert curves.curve(f"train/loss_{domain}") == expected.curve("train/loss")
        assert {name: value for name, value in curves.last.items() if name.endswith(domain)} == {
            f"{name}_{domain}": value for name, value in expected.last.items()
        }
        state = together.net.get_submodule(domain).state_dict()
        assert all(torch.equal(state[name], value) for name, value in own.net.state_dict().items())
    total = [a + b for a, b in zip(*(curves.curve(f"train/loss_{d}") for d in alone), strict=True)]
    assert curves.curve("train/loss") == pytest.approx(total, rel=1e-6)


def test_a_language_only_ratio_is_the_language_run(text: Path, tmp_path: Path, language_alone) -> None:
    together = joint()
    curves = fit(together, both("mae", text, 0, 1), tmp_path)
    assert curves.curve("train/loss") == curves.curve("train/loss_language") == language_alone[1].curve("train/loss")
    fresh = joint()
    fresh.parts["vision"].hparams.update(image_size=28, channels=1)
    fresh.parts["language"].hparams.update(vocab_size=256, context_length=32)
    fresh.configure_model()
    for name, value in fresh.net.vision.state_dict().items():
        assert torch.equal(together.net.vision.state_dict()[name], value), name


def test_a_domain_without_a_turn_stands_still_with_its_teacher(text: Path, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            assert (batch["vision"] is None) == (index % 2 == 0)
            states.append({name: value.clone() for name, value in module.net.vision.state_dict().items()})

    run = trainer(STEPS, tmp_path, callbacks=[Watch()], limit_val_batches=0)
    run.fit(joint("dino"), datamodule=both("dino", text, 1, 2))
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states)]
    assert moved == [True, False, True]


@pytest.mark.parametrize("tie", [("alpha",), ("gates",), ("alpha", "gates"), ("ffn",)])
def test_what_is_tied_is_one_tensor_through_training_checkpoint_and_export(tie, text: Path, tmp_path: Path) -> None:
    module = joint(tie=tie)
    fit(module, both("mae", text), tmp_path, gradient_clip_val=1.0)
    tied = {"alpha": ["base"], "gates": ["gate_weight"], "ffn": ["base", "gate_weight"]}
    leaves = {leaf for each in tie for leaf in tied[each]}
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    module.trainer.save_checkpoint(path)
    module.trainer.strategy.checkpoint_io.teardown()
    content = RunCheckpointIO().load_checkpoint(path)
    again = Joint(**content["hyper_parameters"])
    again.configure_model()
    again.load_state_dict(content["state_dict"])
    export(str(path), tmp_path / "net.safetensors")
    files = load_file(tmp_path / "net.safetensors")
    for block in range(2):
        for leaf in ("base", "gate_weight"):
            names = [f"{net}.blocks.{block}.mlp.up_mix.{leaf}" for net in ("vision.encoder", "language")]
            for net in (module.net, again.net):
                first, second = (net.get_parameter(name) for name in names)
                assert (first is second) == (leaf in leaves)
            assert torch.equal(files[names[0]], files[names[1]]) == (leaf in leaves)
            assert torch.equal(files[names[1]], module.net.get_parameter(names[1]))
    owners = [p for group in module.trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(owners) == len(set(owners)) == len([p for p in module.net.parameters() if p.requires_grad])


def test_a_tied_gradient_is_the_weighted_sum_of_both(text: Path, tmp_path: Path) -> None:
    """Seen in the second step, as the language model's layers start behind zeros; the mixes stand still till then."""
    still = OptimizerConfig(lr=3e-3, mixing_lr_factor=0.0)
    found: dict[str, torch.Tensor] = {}

    class Last(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
            mixes = {d: module.parts[d].trunk().blocks[0].mlp.up_mix.base for d in ("vision", "language")}
            found.update({d: base.grad.clone() for d, base in mixes.items()})

    gradients = {}
    for tie in ((), ("alpha",)):
        parts = task("mae", "moa", optimizer=still), task("language", "moa", optimizer=still)
        module = Joint(*parts, tie=tie, vision_weight=0.5, language_weight=3.0)  # type: ignore[arg-type]
        run = trainer(2, tmp_path, callbacks=[Last()], limit_val_batches=0)
        run.fit(module, datamodule=both("mae", text))
        gradients[tie] = dict(found)
    apart, tied = gradients[()], gradients["alpha",]
    torch.testing.assert_close(tied["vision"], apart["vision"] + apart["language"])
    assert apart["language"].norm() > 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ffn": "gelu", "tie": ("alpha",)}, "trained α"),
        ({"ffn": "la", "tie": ("gates",)}, "trained gates"),
        ({"ffn": "moa", "tie": ("gates",), "language": {"wide": True}}, r"gate_weight is|gate_weight of one shape"),
        ({"ffn": "moa", "tie": ("ffn",), "language": {"wide": True}}, "same width"),
        ({"ffn": "moa", "tie": ("alpha",), "language": {"deep": True}}, "same depth"),
    ],
)
def test_layers_that_cannot_be_tied_are_refused(options: dict[str, Any], message: str) -> None:
    size = options.pop("language", {})
    module = joint(**options)
    hparams = module.parts["language"].hparams
    hparams.update(vocab_size=256, context_length=32)
    module.parts["language"].gpt = type(module.parts["language"].gpt)(  # type: ignore[attr-defined]
        depth=3 if size.get("deep") else 2, dim=64 if size.get("wide") else 32, num_heads=2
    )
    module.parts["vision"].hparams.update(image_size=28, channels=1)
    with pytest.raises(UserError, match=message):
        module.configure_model()


def test_the_layer_of_both_takes_the_place_of_their_own() -> None:
    module = Joint(task("mae", "gelu"), task("language", "la"), FFNConfig("moa"))  # type: ignore[arg-type]
    assert [part.ffn.mixing for part in module.parts.values()] == ["moa", "moa"]  # type: ignore[attr-defined]
    assert fragment("gelu").mixing == "fixed"


@pytest.mark.parametrize("options", [{"tie": ("beta",)}, {"vision_weight": 0.0}, {"language_weight": float("inf")}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^model\."):
        joint(**options)
