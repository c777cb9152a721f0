"""TensorBoard's own two overviews: the custom-scalars page of a run, and the HPARAMS table over the runs of a grid.

Both are written once, as the first events of a run. A resumed run finds them in the event file that it continues: they
carry no step, so cutting the file back to the checkpoint (files.py) keeps them. The HPARAMS table takes each metric's
value from the run's own scalars, so it shows how far a run is as well as how it ended, and nothing has to be written
at the end.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch.utils.tensorboard.summary import custom_scalars, hparams

from .common import tensorboard_writer

METRICS = ("val/loss", "val/bits_per_byte", "val/knn_top1", "train/loss", "perf/tokens_per_second", "perf/mfu")
LAYER = ("mixing", "form", "activation", "branches", "gate", "gates", "init", "base", "match", "hidden_extra")
FFN = (*LAYER, "attention_gate", "pointwise_norm")
AXES = ("samples", "tokens", "megaflops", "seconds")
LAYOUT = {  # page section -> chart -> (kind, regular expressions of tags)
    "Convergence": {
        "loss by step": ("Multiline", [r"^(train|val)/loss$"]),
        **{f"loss by {axis}": ("Multiline", [rf"^(train|val)/loss_vs_{axis}$"]) for axis in AXES},
        "other validation metrics": ("Multiline", [r"^val/(?!loss)\w+$"]),
    },
    "Mixes": {
        "gate entropy of each layer": ("Multiline", [r"^mixing/.+/gate_entropy$"]),
        "saturated gates of each layer": ("Multiline", [r"^mixing/.+/gate_saturation$"]),
        "gate entropy by class of token": ("Multiline", [r"^mixing/.+/entropy/.+$"]),
    },
    "Speed": {
        "throughput": ("Multiline", [r"^perf/(tokens|images)_per_second$"]),
        "FLOPs": ("Multiline", [r"^perf/(mfu|flops_per_second)$"]),
    },
}


class Dashboard(L.Callback):
    """Writes the layout of the custom-scalars page and the run's hyper-parameters into its event file."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        writer = tensorboard_writer(trainer)
        if writer is None or trainer.global_step > 0:
            return
        parameters = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        settings = {"task": type(pl_module).__name__, **settings_of(pl_module.hparams), "parameters": parameters}
        events = writer._get_file_writer()
        events.add_summary(custom_scalars(LAYOUT))
        experiment, session, _ = hparams(settings, dict.fromkeys(METRICS, 0.0))  # the end of a session is not told
        events.add_summary(experiment)
        events.add_summary(session)


def settings_of(options: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """What tells the runs of a grid apart, from a task's hyper-parameters: feed-forward layer, size, rate, seed."""
    ffn, optimizer = options.get("ffn") or {}, options.get("optimizer") or {}
    size = options.get("gpt") or options.get("backbone_args") or {}
    found = {f"ffn/{name}": ffn.get(name) for name in FFN}
    found |= {f"size/{name}": value for name, value in size.items()}
    found |= {"lr": optimizer.get("lr"), "seed": options.get("seed")}
    return {name: value for name, value in found.items() if isinstance(value, str | int | float)}
