"""Every task with every kind of feed-forward layer: it trains, validates, and its checkpoint stands on its own."""

import math

import lightning as L
import pytest
import torch

from data import TokenFiles
from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import GPT
from moa_lightning.moe import MoEConfig
from moa_lightning.optim import OptimizerConfig
from tasks import DINO, MAE, ImageClassification, Task
from tests.data.texts import nanogpt_folder
from tests.models.nets import fragment
from tests.tasks.conftest import TASKS, VIT, data_for, task, trainer
from tests.tasks.recorder import Recorder

FFNS = ("gelu", "la", "moa", "moa_gated_both")
METRICS = {
    "language": {"val/loss", "val/perplexity", "val/bits_per_byte"},
    "mae": {"val/loss", "val/knn_top1", "val/feature_rank", "val/feature_spread"},
    "dino": {"val/knn_top1", "val/feature_rank", "val/feature_spread"},
}


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (int, float, str, bool)


def answer(model, batch) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch["tokens"] if "tokens" in batch else batch["image"])


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("kind", TASKS)
def test_five_steps_a_validation_and_a_checkpoint(kind: str, ffn: str, text, tmp_path) -> None:
    model, recorder = task(kind, ffn, seed=3), Recorder()
    run = trainer(5, tmp_path, callbacks=[recorder], limit_train_batches=5)
    run.fit(model, datamodule=data_for(kind, text))
    assert run.global_step == 5
    assert len(recorder.losses) == 5
    assert all(map(math.isfinite, recorder.losses))
    metrics = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    assert metrics.keys() == METRICS[kind]
    assert all(map(math.isfinite, metrics.values()))

    path = tmp_path / "task.ckpt"
    run.save_checkpoint(path)
    loaded = type(model).load_from_checkpoint(path, weights_only=True)
    assert loaded._trainer is None  # no data module either: the sizes are in the checkpoint
    assert torch.equal(answer(loaded, recorder.batch), answer(model, recorder.batch))
    hyper = torch.load(path, weights_only=True)["hyper_parameters"]
    assert plain(hyper)
    assert hyper["ffn"]["mixing"] == model.ffn.mixing
    assert hyper["seed"] == 3
    assert None not in (hyper.get("vocab_size", 0), hyper.get("image_size", 0))


@pytest.mark.parametrize("kind", TASKS)
def test_the_loss_falls(kind: str, text, tmp_path) -> None:
    """DINO's loss rises while teacher and centre move, so there the student is to learn a teacher that stands still."""
    recorder = Recorder()
    held = {"teacher_momentum": 1.0, "center_momentum": 1.0, "teacher_temperature": 0.04, "freeze_last_layer": 0.0}
    model = task(kind, "moa", **(held if kind == "dino" else {}))
    trainer(40, tmp_path, callbacks=[recorder], limit_val_batches=0).fit(model, datamodule=data_for(kind, text))
    first, last = (sum(part) / 5 for part in (recorder.losses[:5], recorder.losses[-5:]))
    assert last < first * {"language": 0.8, "mae": 0.95, "dino": 0.8}[kind]


@pytest.mark.parametrize("kind", TASKS)
def test_every_trainable_parameter_moves_and_only_those(kind: str, text, tmp_path) -> None:
    """Two steps: where a projection starts at zero, what lies before it has its first gradient at the second."""
    options = {"freeze_last_layer": 0.0} if kind == "dino" else {}
    model, module = task(kind, "moa_gated_both", **options), data_for(kind, text)
    before: dict[str, torch.Tensor] = {}
    recorder = Recorder()
    recorder.on_train_start = lambda *_: before.update({n: p.detach().clone() for n, p in model.net.named_parameters()})
    trainer(3, tmp_path, callbacks=[recorder], limit_val_batches=0).fit(model, datamodule=module)
    still = {n for n, p in model.net.named_parameters() if torch.equal(p, before[n])}
    held = {n for n, p in model.net.named_parameters() if not p.requires_grad and not n.startswith("teacher")}
    assert still == held


@pytest.mark.parametrize("kind", TASKS)
def test_the_same_seed_gives_the_same_run(kind: str, text, tmp_path) -> None:
    losses = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        recorder = Recorder()
        run = trainer(3, tmp_path, callbacks=[recorder], limit_val_batches=0)
        run.fit(task(kind, "moa_paper", seed=1), datamodule=data_for(kind, text))
        losses.append(recorder.losses)
    assert losses[0] == losses[1]


def test_an_open_seed_is_the_runs_seed(text, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    model, fixed = task("language"), task("language", seed=11)
    for each in (model, fixed):
        run = trainer(1, tmp_path, limit_train_batches=0, limit_val_batches=0)
        run.fit(each, datamodule=data_for("language", text))
    assert model.hparams["seed"] == 11
    assert torch.equal(model.net.embed.weight, fixed.net.embed.weight)


@pytest.mark.parametrize("kind", TASKS)
def test_test_and_predict_run(kind: str, text, tmp_path) -> None:
    model, module = task(kind), data_for(kind, text)
    run = trainer(
        1, tmp_path, limit_train_batches=1, limit_val_batches=0, limit_test_batches=2, limit_predict_batches=2
    )
    run.fit(model, datamodule=module)
    run.test(model, datamodule=module, verbose=False)
    assert {name for name in run.callback_metrics if name.startswith("test/")} == {
        name.replace("val", "test") for name in METRICS[kind]
    }
    batches = run.predict(model, datamodule=module)
    assert batches[0].keys() == ({"id", "loss"} if kind == "language" else {"id", "label", "features"})
    assert torch.cat([batch["id"] for batch in batches]).tolist() == list(range(32))


def test_sizes_given_and_taken_from_the_data_build_the_same_net(text, tmp_path) -> None:
    taken, given = task("mae"), task("mae", image_size=28, channels=1, seed=0)
    run = trainer(1, tmp_path, limit_train_batches=0, limit_val_batches=0)
    run.fit(taken, datamodule=data_for("mae", text))
    given.configure_model()
    state = given.net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in taken.net.state_dict().items())


def test_a_decoder_may_have_a_feed_forward_layer_of_its_own(text, tmp_path) -> None:
    model = task("mae", "moa", decoder_ffn=fragment("swiglu"))
    run = trainer(1, tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(model, datamodule=data_for("mae", text))
    run.save_checkpoint(tmp_path / "task.ckpt")
    for each in (model, MAE.load_from_checkpoint(tmp_path / "task.ckpt", weights_only=True)):
        assert all(block.mlp.config == fragment("moa") for block in each.net.encoder.blocks)
        assert all(block.mlp.config == fragment("swiglu") for block in each.net.decoder.blocks)


def test_a_run_without_a_countable_end_is_refused(text, tmp_path) -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps"):
        trainer(-1, tmp_path, max_epochs=-1).fit(task("language"), datamodule=data_for("language", text))


@pytest.mark.parametrize("kind", TASKS)
def test_gradients_are_clipped_in_bf16_too(kind: str, text, tmp_path) -> None:
    """With the optimiser's fused kernel, which Lightning's own clipping refuses under mixed precision."""
    norms: list[float] = []

    class Norms(L.Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if gradients:
                norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    options = {"precision": "bf16-mixed", "gradient_clip_val": 1e-2, "limit_val_batches": 0, "callbacks": [Norms()]}
    trainer(3, tmp_path, **options).fit(task(kind, "moa"), datamodule=data_for(kind, text))
    assert norms == pytest.approx([1e-2] * len(norms), rel=1e-3)
    assert len(norms) >= 2


def test_the_rate_of_a_run_follows_its_batch(text, tmp_path) -> None:
    """16 samples a batch, two batches a step, for a rate that is meant for 8."""
    optimizer = OptimizerConfig(lr=1e-3, reference_batch=8, warmup_fraction=0.5)
    model, rates = task("mae", optimizer=optimizer), []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0, "callbacks": [Rates()]}
    trainer(4, tmp_path, **options).fit(model, datamodule=data_for("mae", text))
    assert rates == pytest.approx([2e-3, 4e-3, 4e-3, 2e-3])
    assert model.chosen == {"lr": pytest.approx(4e-3)}


def test_a_step_that_is_skipped_leaves_the_biases_of_routers(text, tmp_path) -> None:
    model = task("language", moe=MoEConfig(4, 2, balance="bias", balance_bias_rate=0.01))
    biases: list[torch.Tensor] = []

    class Bad(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            if trainer.global_step == 1:
                pl_module.net.head.weight.grad.fill_(math.nan)

        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            biases.append(torch.stack([block.mlp.router.bias.clone() for block in pl_module.net.blocks]))

    run = trainer(3, tmp_path, limit_val_batches=0, callbacks=[Bad()])
    run.fit(model, datamodule=data_for("language", text))
    first, skipped, third = biases
    assert torch.equal(skipped, first)
    assert first.abs().max() == pytest.approx(0.01)
    assert not torch.equal(third, skipped)


@pytest.mark.parametrize("characters", ["ab ", "ab", "ab \n"])
def test_a_sample_begins_with_what_the_vocabulary_has(characters, tmp_path, monkeypatch) -> None:
    ids = nanogpt_folder(tmp_path / "char", characters * 300)
    module = TokenFiles(str(tmp_path / "char"), context_length=8, batch_size=4)
    model = task("language")
    trainer(1, tmp_path, limit_train_batches=1, limit_val_batches=0).fit(model, datamodule=module)
    prompts, generate = [], GPT.generate

    def watched(net, prompt, *options, **named):
        prompts.append(prompt.tolist())
        return generate(net, prompt, *options, **named)

    monkeypatch.setattr(GPT, "generate", watched)
    assert len(model.texts()["sample"]) > 100
    assert prompts == [[[ids.get("\n", ids.get(" ", module.tokenizer.separator))]]]


def test_a_vocabulary_may_be_padded_but_no_size_may_be_too_small(text, tmp_path) -> None:
    """The rows behind the data's ids would win every draw."""
    padded = task("language", vocab_size=300)
    trainer(1, tmp_path, limit_train_batches=1, limit_val_batches=0).fit(padded, datamodule=data_for("language", text))
    with torch.no_grad():
        padded.net.head.weight[256:299], padded.net.head.weight[299] = 1e3, -1e3
    assert len(padded.texts()["sample"]) > 100
    with pytest.raises(UserError, match=r"model\.vocab_size is 255, but the data have 256"):
        trainer(1, tmp_path).fit(task("language", vocab_size=255), datamodule=data_for("language", text))


@pytest.mark.parametrize("same", [True, False])
def test_a_run_that_goes_on_takes_the_options_that_it_is_given(same: bool, text, tmp_path) -> None:
    """A checkpoint brings options of the run that wrote it; those of a fresh optimiser are what is right."""
    first = OptimizerConfig("muon", warmup_steps=4, lr=1e-3)
    others = {"weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-5, "momentum": 0.5, "mixing_lr_factor": 3.0}
    second = first if same else OptimizerConfig("muon", warmup_steps=8, lr=1e-4, **others)
    seen: list[dict] = []

    class Groups(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            seen.append([{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups])

    whole = trainer(4, tmp_path, limit_val_batches=0, callbacks=[Groups()])
    begun = trainer(4, tmp_path, limit_val_batches=0, limit_train_batches=2, max_epochs=1)
    for run, config in ((whole, second), (begun, first)):
        run.fit(task("language", "moa", optimizer=config), datamodule=data_for("language", text))
    begun.save_checkpoint(tmp_path / "begun.ckpt")
    expected, seen[:] = seen[2:], []
    goes_on = trainer(4, tmp_path, limit_val_batches=0, callbacks=[Groups()])
    module = task("language", "moa", optimizer=second)
    goes_on.fit(module, datamodule=data_for("language", text), ckpt_path=tmp_path / "begun.ckpt", weights_only=True)
    assert seen == expected
    assert len(seen) == 2


def test_dino_can_clip_each_parameter_by_itself(text, tmp_path) -> None:
    """As the official code does: a gradient g becomes g · min(1, largest / (|g| + 1e-6))."""
    seen: list[list[torch.Tensor]] = []

    class Gradients(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.keep(pl_module)

        def on_before_zero_grad(self, trainer, pl_module, optimizer) -> None:
            if len(seen) == 1:  # the clipped ones of the first step
                self.keep(pl_module)

        def keep(self, pl_module) -> None:
            seen.append([p.grad.clone() for p in pl_module.net.student.parameters() if p.grad is not None])

    options = {"gradient_clip_val": 3.0, "limit_val_batches": 0, "callbacks": [Gradients()]}
    model = task("dino", clip_per_parameter=True, freeze_last_layer=0.0)
    trainer(2, tmp_path, **options).fit(model, datamodule=data_for("dino", text))
    before, after = seen[:2]
    assert any(g.norm() > 3.0 for g in before)
    assert any(g.norm() < 3.0 for g in before)
    for g, clipped in zip(before, after, strict=True):
        assert torch.allclose(clipped, g * (3.0 / (g.norm() + 1e-6)).clamp(max=1.0), rtol=1e-5, atol=0)


def test_float16_is_refused(text, tmp_path) -> None:
    with pytest.raises(UserError, match="bf16-mixed"):
        trainer(1, tmp_path, precision="16-true").fit(task("language"), datamodule=data_for("language", text))


def test_a_hidden_ratio_for_a_timm_net_is_refused(text, tmp_path) -> None:
    wide = MAE("vit_tiny_patch16_224", ffn=FFNConfig(hidden_ratio=2.0))
    with pytest.raises(UserError, match="mlp_ratio"):
        trainer(1, tmp_path).fit(wide, datamodule=data_for("mae", text))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dino", {"out_dim": (0, -3, 1), "head_hidden_dim": (0, -1), "head_bottleneck_dim": (0, -1)}),
        ("dino", {"student_temperature": (-0.1, 0.0, math.inf), "teacher_temperature": (-0.1, 0.0, math.nan)}),
        ("dino", {"teacher_temperature_start": (0.0, -1.0), "teacher_temperature_warmup": (-1.0, 30.0)}),
        ("dino", {"drop_path_rate": (-0.1, 1.0, 2.0), "freeze_last_layer": (-0.1, 1.0, 1.5)}),
        ("dino", {"teacher_momentum": (2.0, -1.0, math.nan), "center_momentum": (-0.1, 1.5)}),
        ("dino", {"koleo_weight": (-1.0, math.inf, math.nan), "final_weight_decay": (-1.0, math.inf)}),
        ("dino", {"layer_decay": (0.0, 1.1), "patch_embed_rate": (0.0, math.nan)}),
        ("mae", {"decoder_dim": (0, -16), "decoder_depth": (0, -1), "decoder_heads": (0, -2)}),
        ("classification", {"drop_path_rate": (1.0, -0.1), "label_smoothing": (1.0, math.nan)}),
        ("classification", {"mixup": (-1.0, math.nan), "cutmix": (-1.0, math.inf), "random_erasing": (-0.1, 1.1)}),
        ("classification", {"layer_decay": (0.0, 1.1), "num_classes": (0, -1)}),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(kind: str, options: dict[str, tuple[float, ...]]) -> None:
    for name, values in options.items():
        for value in values:
            with pytest.raises(UserError, match=rf"^model\.{name} is {value} but must be "):
                build(kind, name, value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dino", {"teacher_momentum": 1.0, "center_momentum": 0.0, "teacher_temperature_warmup": 1.0}),
        ("dino", {"drop_path_rate": 0.0, "freeze_last_layer": 0.0, "koleo_weight": 0.0, "final_weight_decay": None}),
        ("dino", {"layer_decay": 1.0, "patch_embed_rate": 1.0, "teacher_temperature": None, "out_dim": None}),
        ("mae", {"decoder_dim": 4, "decoder_depth": 1, "decoder_heads": 1}),
        ("classification", {"random_erasing": 1.0, "mixup": 0.0, "cutmix": 0.0, "num_classes": None}),
    ],
)
def test_numbers_at_the_ends_of_what_makes_sense_are_taken(kind: str, options: dict[str, float | None]) -> None:
    for name, value in options.items():
        assert build(kind, name, value).hparams[name] == value


def build(kind: str, name: str, value: float | None) -> Task:
    net = {"dino": DINO, "mae": MAE, "classification": ImageClassification}[kind]
    return net("vit_tiny_patch16_224", VIT, **{name: value})


def test_dino_needs_two_views(text, tmp_path) -> None:
    with pytest.raises(UserError, match="two views"):
        trainer(1, tmp_path).fit(task("dino"), datamodule=data_for("mae", text))


@pytest.mark.parametrize("kind", TASKS)
def test_a_size_that_nobody_gives_is_an_error_that_names_it(kind: str) -> None:
    with pytest.raises(UserError, match="vocab_size" if kind == "language" else "image_size"):
        task(kind).configure_model()
