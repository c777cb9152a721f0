"""TensorBoard's custom-scalars page and HPARAMS table, as its own readers find them."""

import re

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from moa_lightning.callbacks import Convergence, Dashboard, MixingTelemetry
from moa_lightning.callbacks.dashboard import settings_of
from moa_lightning.callbacks.files import _events
from moa_lightning.feedforward import FFNConfig

from .toy import ToyTask, events
from .toy import fit as fit_toy

LAYOUT_TAG = "custom_scalars__config__"


def fit(module, folder, callbacks, **options):
    """As `moa fit` logs: without a metric of Lightning's own in the table."""
    logger = TensorBoardLogger(folder.parent, name="", version=folder.name, default_hp_metric=False)
    return fit_toy(module, folder, callbacks, logger=logger, **options)


def task() -> ToyTask:
    made = ToyTask(FFNConfig("moa", dictionary=("identity", "gelu", "relu")))
    ffn = FFNConfig("moa", gate="tanh").as_dict()
    made.save_hyperparameters({"ffn": ffn, "optimizer": {"lr": 0.002}, "gpt": {"depth": 2}, "seed": 7})
    return made


def hparams_content(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator.PluginTagToContent("hparams")[tag]


def test_the_hparams_table_knows_the_run_and_where_its_metrics_are(tmp_path):
    fit(task(), tmp_path / "run", [Dashboard()])
    start = metadata.parse_session_start_info_plugin_data(
        hparams_content(tmp_path / "run", metadata.SESSION_START_INFO_TAG)
    )
    known = {name: value.string_value or value.number_value for name, value in start.hparams.items()}
    assert known["ffn/mixing"] == "moa"
    assert known["ffn/gate"] == "tanh"
    assert known["lr"] == 0.002
    assert known["seed"] == 7
    assert known["size/depth"] == 2
    assert known["parameters"] == sum(p.numel() for p in task().parameters())
    experiment = metadata.parse_experiment_plugin_data(hparams_content(tmp_path / "run", metadata.EXPERIMENT_TAG))
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert {"val/loss", "train/loss"} <= metrics & set(events(tmp_path / "run").Tags()["scalars"])


def test_the_layout_finds_the_scalars_of_a_run(tmp_path):
    fit(task(), tmp_path / "run", [Dashboard(), MixingTelemetry(), Convergence()])
    log = events(tmp_path / "run")
    layout = layout_pb2.Layout.FromString(log.Tensors(LAYOUT_TAG)[0].tensor_proto.string_val[0])
    found = {
        chart.title: {tag for tag in log.Tags()["scalars"] for rule in chart.multiline.tag if re.search(rule, tag)}
        for category in layout.category
        for chart in category.chart
    }
    assert found["loss by step"] == {"train/loss", "val/loss"}
    for axis in ("samples", "tokens", "megaflops", "seconds"):
        assert found[f"loss by {axis}"] == {f"train/loss_vs_{axis}", f"val/loss_vs_{axis}"}
    assert found["gate entropy of each layer"] == {f"mixing/block0{i}/up/gate_entropy" for i in (0, 1)}


def test_a_resumed_run_has_both_once(tmp_path):
    def fit_to(steps, **options):
        saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1)
        fit(task(), tmp_path / "run", [Dashboard(), Convergence(), saver], max_steps=steps, **options)

    fit_to(8)
    fit_to(10, ckpt_path=str(tmp_path / "ckpt/step=4.ckpt"))
    tags = [
        value.tag
        for path in (tmp_path / "run").glob("events*")
        for _, event in _events(path)
        for value in event.summary.value
    ]
    for tag in (LAYOUT_TAG, metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG):
        assert tags.count(tag) == 1, tag
    steps = [event.step for event in events(tmp_path / "run").Scalars("train/loss")]
    assert steps == sorted(set(steps)) == [1, 3, 5, 7, 9]


def test_settings_without_a_value_are_left_out():
    assert settings_of({"ffn": None, "seed": None, "backbone_args": {"depth": 2, "act_layer": None}}) == {
        "size/depth": 2
    }
