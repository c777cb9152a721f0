"""Judging texts: a GPT with a head for classes or for a number, fine-tuned from a LanguageModeling run or from scratch.

One text and several are the same to the net: the texts of a sample stand one after another, each with the token between
documents behind it, and the head reads the last of these tokens (models/sequence_classifier.py). Classes are trained by
cross-entropy. A number is predicted in units of the training labels, (label - mean) / standard deviation, by squared
error: so a loss of 1 is that of the mean, and a head that starts at zero starts there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.evaluation.labels import LabelMetrics, label_metrics, score_names
from moa_lightning.evaluation.token_classes import TokenClasses
from moa_lightning.models import GPTConfig, SequenceClassifier
from moa_lightning.models.sequence_classifier import HEAD
from moa_lightning.moe import MoEConfig
from moa_lightning.optim import OptimizerConfig

from .base import Recompute, check_numbers
from .fine_tuning import check_judged, check_labelled
from .gpt import GPTTask


class SequenceClassification(GPTTask):
    """A GPT with a linear head that reads a text's last token, trained on labels.

    Args:
        gpt: the size of the model.
        ffn: the feed-forward layer of every block; LA and MoA may start from weights with a fixed activation.
        optimizer: AdamW or Muon, and the schedule.
        weights_from: a run's folder or a checkpoint of LanguageModeling or SequenceClassification whose weights the net
            starts with, but for the head. None: from scratch.
        layer_decay: each layer learns at this share of the rate of the layer above; 1: all alike.
        label_smoothing: share of the target that is spread over all classes.
        num_classes: size of the head; 1: a number is predicted; None: the data's.
        target_scale: mean and standard deviation of the numbers to predict; None: those of the data's training labels.
        metrics: scores whose mean is val/score; None: the data's, which for GLUE and SuperGLUE are the official ones.
        vocab_size: number of token ids; None: the data's.
        context_length: longest input in tokens; None: the data's.
        seed: of the initial weights; None: the run's seed.
        compile: compile each transformer block.
        activation_checkpointing: recompute each block in the backward pass instead of storing its activations;
            "selective" keeps its matrix products and attention and recomputes the rest.
        moe: experts in place of every block's feed-forward layer; experts may choose tokens here.
    """

    forward_methods = ("features",)
    own_start = (HEAD,)

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),  # noqa: B008 - frozen
        ffn: FFNConfig = FFNConfig(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        weights_from: str | None = None,
        layer_decay: float = 1.0,
        label_smoothing: float = 0.0,
        num_classes: int | None = None,
        target_scale: tuple[float, float] | None = None,
        metrics: list[str] | None = None,
        vocab_size: int | None = None,
        context_length: int | None = None,
        seed: int | None = None,
        compile: bool = False,
        activation_checkpointing: Recompute = False,
        moe: MoEConfig = MoEConfig(),  # noqa: B008
    ) -> None:
        super().__init__(gpt, ffn, moe, optimizer, seed, compile, activation_checkpointing, weights_from)
        check_numbers("(0, 1]", layer_decay=layer_decay)
        check_numbers("[0, 1)", label_smoothing=label_smoothing)
        check_numbers("[1, inf)", num_classes=num_classes)
        if target_scale is not None and not target_scale[1] > 0:
            raise UserError(f"target_scale is {list(target_scale)}; give a mean and a standard deviation above 0")
        self.keep_hyperparameters(locals(), gpt=self.gpt, ffn=self.ffn, moe=self.moe, optimizer=self.optimizer_config)
        self._metrics: LabelMetrics | None = None  # while a split is evaluated

    def build(self, seed: int) -> nn.Module:
        sizes = self.from_data("vocab_size"), self.from_data("context_length"), self.from_data("num_classes")
        return SequenceClassifier(self.gpt, self.ffn, *sizes, seed, self.moe)

    def choose(self) -> None:
        """Take from the data what the labels mean."""
        classes = self.from_data("num_classes")
        if classes == 1:
            self.from_data("target_scale")
        wanted, known = self.from_data("metrics"), score_names(classes)
        if not wanted or not set(wanted) <= set(known):
            raise UserError(f"model.metrics is {wanted}; give one or more of {', '.join(known)}")

    def on_train_start(self) -> None:
        super().on_train_start()
        check_labelled(self, "text")

    def on_validation_start(self) -> None:
        super().on_validation_start()
        check_judged(self, "val", "text")

    def on_test_start(self) -> None:
        super().on_test_start()
        check_judged(self, "test", "text")

    def learning_rates(self) -> dict[str, float] | None:
        decay = self.hparams["layer_decay"]
        return None if decay == 1 else self.net.layer_rates(decay)

    def features(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What the head reads: (B, d)."""
        return self.net.features(tokens, lengths)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tokens int64 (B, T), of which the first `lengths`, int64 (B,), are real -> logits (B, num_classes)."""
        return self.net(tokens, lengths)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        logits = self.net(batch["tokens"], batch["lengths"])
        loss = self.losses(logits, batch["label"], self.hparams["label_smoothing"]).mean()
        self.log("train/loss", loss.detach(), sync_dist=True)
        return self.with_router_loss(loss)

    def losses(self, logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
        """Of logits (B, num_classes) and labels (B,), float32 (B,)."""
        if self.hparams["num_classes"] > 1:
            return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        mean, deviation = self.hparams["target_scale"]
        return (logits[:, 0].float() - (labels - mean) / deviation).square()

    def predictions(self, logits: Tensor) -> Tensor:
        """The most likely classes, int64 (B,), or the numbers, float32 (B,)."""
        if self.hparams["num_classes"] > 1:
            return logits.argmax(-1)
        mean, deviation = self.hparams["target_scale"]
        return mean + deviation * logits[:, 0].float()

    def mix_forward(self, batch: dict[str, Any]) -> None:
        self.net(batch["tokens"], batch["lengths"])

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self._evaluate(batch)

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """Logits (B, num_classes) and predictions (B,) of the texts, with their ids and labels."""
        logits = self.net(batch["tokens"], batch["lengths"])
        return {"id": batch["id"], "label": batch["label"], "logits": logits, "prediction": self.predictions(logits)}

    def _evaluate(self, batch: dict[str, Any]) -> None:
        if self._metrics is None:
            self._metrics = label_metrics(self.hparams["num_classes"]).to(self.device)
        labels = batch["label"]
        known = (labels.isfinite() if labels.is_floating_point() else labels >= 0) & (batch["id"] >= 0)
        logits, labels = self.net(batch["tokens"], batch["lengths"])[known], labels[known]
        self._metrics.update(self.losses(logits, labels), self.predictions(logits), labels)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        assert self._metrics is not None
        values, self._metrics = self._metrics.compute(), None  # over all processes: every rank logs the same
        official = [values[name] for name in self.hparams["metrics"]]
        values["score"] = torch.stack(official).mean()
        for name, value in values.items():
            self.log(f"{split}/{name}", value.float().to(self.device), prog_bar=name == "score", sync_dist=True)

    def flops_per_sample(self) -> float:
        """At full context, so too many where texts are shorter."""
        net = self.net
        return 3.0 * (net.flops_per_token() * net.context_length + 2 * net.head.weight.numel())

    def token_classes(self, batch: dict[str, Any]) -> TokenClasses:
        found = super().token_classes(batch)
        padding = torch.arange(found.ids.shape[1]) >= batch["lengths"].cpu()[:, None]
        return TokenClasses(found.names, found.ids.masked_fill(padding, -1), pieces=found.pieces)
