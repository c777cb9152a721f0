"""Classification of images by a whole vision transformer: fine-tuning an encoder that MAE or DINO pre-trained, or a
timm model, or training from scratch.

The recipe is MAE's (He et al., arXiv 2111.06377, and its official code): AdamW with a learning rate that falls from
layer to layer, drop path, label smoothing, mixup or cutmix of every batch, random erasing; RandAugment is the data's
(data.RandAugment). Mixing, erasing and the losses are timm's. Images are paired inside a process's batch, and each
process draws one mix a batch, so with mixup or cutmix runs on other numbers of devices differ.
"""

import logging
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.evaluation.token_classes import TokenClasses
from moa_lightning.exchange.pretrained import load_encoder, no_weights
from moa_lightning.models import ImageClassifier
from moa_lightning.optim import OptimizerConfig
from moa_lightning.run_folder import given_checkpoint

from .base import Recompute, Task, as_config, check_numbers
from .fine_tuning import check_judged, check_labelled
from .vision import BANK, token_classes

log = logging.getLogger(__name__)

METRICS = ("loss", "top1", "top5")


class ImageClassification(Task):
    """A timm ViT with a linear head, trained on labels.

    Args:
        backbone: timm model name.
        backbone_args: options for timm (embed_dim, depth, num_heads, patch_size, ...).
        ffn: feed-forward layers; LA and MoA may start from weights with a fixed activation.
        backbone_weights: what the encoder starts from: a run's folder or a checkpoint of MAE, DINO or
            ImageClassification, what moa export wrote, or a file of timm's, MAE's or DINO's own weights. None: from
            scratch.
        pool: what the head reads: "avg" (mean over patches, as MAE fine-tunes) or "token" (class token).
        drop_path_rate: at the last block, rising linearly over the blocks.
        layer_decay: each layer learns at this share of the rate of the layer above; 1: all alike.
        mixup: alpha of the beta distribution that images are blended with; 0: never.
        cutmix: alpha of the beta distribution of pasted areas; 0: never. With both, every batch draws one of them.
        label_smoothing: share of the target that is spread over all classes.
        random_erasing: probability that a rectangle of an image becomes noise.
        optimizer: AdamW or Muon, and the schedule.
        num_classes: size of the head; None: the data's.
        class_names: of the classes in the order of their numbers, by which other data with names are judged; None: the
            data's.
        image_size: pixels; None: the data's.
        channels: of the images; None: the data's.
        seed: of the initial weights and of what is drawn while training; None: the run's seed.
        compile: compile each transformer block.
        activation_checkpointing: recompute each block in the backward pass instead of storing its activations;
            "selective" keeps its matrix products and attention and recomputes the rest.

    Attributes:
        probed: features are measured by somebody (FeatureProbes) who needs training images to compare with.
        eval_features: (B, D) of the last evaluated batch, what the head reads; None where they are not probed.
    """

    forward_methods = ("features", "features_and_logits")
    open_options = ("image_size", "channels", "num_classes", "class_names")

    def __init__(
        self,
        backbone: str = "vit_base_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        ffn: FFNConfig = FFNConfig(),  # noqa: B008 - frozen
        backbone_weights: str | None = None,
        pool: Literal["avg", "token"] = "avg",
        drop_path_rate: float = 0.1,
        layer_decay: float = 0.65,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        label_smoothing: float = 0.1,
        random_erasing: float = 0.25,
        optimizer: OptimizerConfig = OptimizerConfig(weight_decay=0.05, betas=(0.9, 0.999)),  # noqa: B008
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        image_size: int | None = None,
        channels: int | None = None,
        seed: int | None = None,
        compile: bool = False,
        activation_checkpointing: Recompute = False,
    ) -> None:
        super().__init__(optimizer, seed, compile, activation_checkpointing)
        check_numbers("(0, 1]", layer_decay=layer_decay)
        check_numbers("[0, 1)", drop_path_rate=drop_path_rate, label_smoothing=label_smoothing)
        check_numbers("[0, 1]", random_erasing=random_erasing)
        check_numbers("[0, inf)", mixup=mixup, cutmix=cutmix)
        check_numbers("[1, inf)", num_classes=num_classes)
        self.ffn = as_config(FFNConfig, ffn)
        self.keep_hyperparameters(
            locals(), backbone_args=backbone_args or {}, ffn=self.ffn, optimizer=self.optimizer_config
        )
        self.metrics = nn.ModuleDict({f"{split}_{name}": MeanMetric() for split in ("val", "test") for name in METRICS})
        self.probed = False
        self.eval_features: Tensor | None = None
        self.class_numbers: Tensor | None = None  # the number here of each class of the data, where they differ
        self.knows_classes = True  # of the data, all of them
        self.mixing: Mixup | None = None
        self.loss: nn.Module = nn.CrossEntropyLoss()

    @property
    def uses_bank(self) -> bool:
        """Whether the data must hand out training images to compare with."""
        return self.probed

    def build(self, seed: int) -> nn.Module:
        h = self.hparams
        net = ImageClassifier(
            h["backbone"],
            h["backbone_args"],
            self.ffn,
            self.from_data("image_size"),
            self.from_data("channels"),
            h["num_classes"] if h["num_classes"] and self._takes_any_class() else self.from_data("num_classes"),
            h["pool"],
            h["drop_path_rate"],
            seed,
        )
        if h["backbone_weights"] is not None and given_checkpoint(h["backbone_weights"]) is not None:
            self.starts = [load_encoder(net.vit, h["backbone_weights"])]
        return net

    def configure_model(self) -> None:
        h = self.hparams
        sized = h["num_classes"] is not None
        super().configure_model()
        if self._trainer is not None:
            self.class_numbers = self._match_classes(not sized or self.trainer.state.fn == TrainerFn.FITTING)
        if h["mixup"] or h["cutmix"]:
            shares = {"mixup_alpha": h["mixup"], "cutmix_alpha": h["cutmix"], "label_smoothing": h["label_smoothing"]}
            self.mixing = Mixup(**shares, num_classes=h["num_classes"])
            self.loss = SoftTargetCrossEntropy()  # the mixed targets are smoothed already
        elif h["label_smoothing"]:
            self.loss = LabelSmoothingCrossEntropy(h["label_smoothing"])

    def _takes_any_class(self) -> bool:
        """Whether images of classes that the run does not have are of use: features are, when a finished net is probed
        or predicts."""
        now = self.trainer.state.fn if self._trainer is not None else None
        return now == TrainerFn.PREDICTING or (self.probed and now in (TrainerFn.TESTING, TrainerFn.VALIDATING))

    def _match_classes(self, adopt: bool) -> Tensor | None:
        """Where each class of the data stands among the run's, by name, or -1; None: their numbers are the run's.

        Args:
            adopt: the net is made for these data, and takes their names where it has none.

        Raises:
            UserError: a class that the run does not have, or names where it has none, and features are not what is
                asked for.
        """
        self.knows_classes = True
        count, theirs = self.hparams["num_classes"], getattr(self.data, "class_names", None)
        if adopt and self.hparams["class_names"] is None and theirs is not None and len(theirs) <= count:
            self.hparams["class_names"] = list(theirs)
        ours = self.hparams["class_names"]
        if ours is None and theirs is not None and not adopt:
            self._strange(
                f"the data have names of classes ({_first(theirs)}), and the run has numbers only, which may be others",
                "give model.class_names, the run's classes in the order of their numbers",
            )
            return torch.full((len(theirs),), -1)
        if ours is None or theirs is None:
            found = getattr(self.data, "num_classes", None) or 0
            if found > count:
                self._strange(
                    f"the data have class numbers up to {found - 1}, and the net has {count} classes",
                    "leave out images of other classes",
                )
                return torch.tensor([number if number < count else -1 for number in range(found)])
            return None
        if unknown := [name for name in theirs if name not in ours]:
            self._strange(
                f"the data have the class '{unknown[0]}', which the run does not know ({_first(ours)})",
                "leave its images out",
            )
        if ours[: len(theirs)] == list(theirs):
            return None
        return torch.tensor([ours.index(name) if name in ours else -1 for name in theirs])

    def _strange(self, what: str, advice: str) -> None:
        """Refuse classes that the run does not have, or go on without judging by them."""
        if not self._takes_any_class():
            raise UserError(f"{what}: {advice}")
        self.knows_classes = False
        if self.trainer.is_global_zero:
            log.warning("%s: features are taken, and the run's own answers are not judged", what)

    def labels(self, batch: dict[str, Any]) -> Tensor:
        """Class numbers (B,) of a batch as the net has them, -1 where they are unknown."""
        given: Tensor = batch["label"]
        if self.class_numbers is None:
            return given
        return torch.where(given < 0, given, self.class_numbers.to(given.device)[given.clamp_min(0)])

    def on_train_start(self) -> None:
        """Refuse images without labels, and to begin without the weights; a run that goes on has its own."""
        super().on_train_start()
        check_labelled(self, "image")
        weights = self.hparams["backbone_weights"]
        if self.global_step == 0 and weights is not None and given_checkpoint(weights) is None:
            raise UserError(no_weights(weights))

    def on_validation_start(self) -> None:
        super().on_validation_start()
        check_judged(self, "val", "image")

    def on_test_start(self) -> None:
        super().on_test_start()
        check_judged(self, "test", "image")

    def learning_rates(self) -> dict[str, float] | None:
        decay = self.hparams["layer_decay"]
        return None if decay == 1 else self.net.layer_rates(decay)

    def features(self, images: Tensor) -> Tensor:
        """What the head reads of images (B, C, H, W): (B, D)."""
        return self.net.features(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, C, H, W)."""
        return self.net(images)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        images, targets = self.regularised(batch["views"][0], self.labels(batch))
        loss = self.loss(self.net(images), targets)
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def regularised(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) erased and mixed, and their targets: labels (B,), or shares of classes (B, num_classes).

        Draws from the global generators.
        """
        if self.hparams["random_erasing"]:
            erasing = RandomErasing(self.hparams["random_erasing"], mode="pixel", device=images.device)
            images = erasing(images.clone())
        if self.mixing is None:
            return images, labels
        if len(images) % 2:
            raise UserError(
                f"mixup and cutmix pair images, and a process's batch has {len(images)}: give an even data.batch_size"
            )
        return self.mixing(images.clone(), labels)

    def mix_forward(self, batch: dict[str, Any]) -> None:
        self.net(batch["views"][0])

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, "test", dataloader_idx)

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """Logits (B, num_classes) and features (B, D) of the images, with their ids and labels, -1 for classes that the
        run does not have."""
        features, logits = self.net.features_and_logits(batch["image"])
        return {"id": batch["id"], "label": self.labels(batch), "features": features, "logits": logits}

    def _evaluate(self, batch: dict[str, Any], split: str, loader: int) -> None:
        """Loss, and percent of held-out images whose class is the most likely one, or one of the five; features only
        of the bank, and of images of classes that the run does not have."""
        if self.probed and (loader == BANK or not self.knows_classes):
            self.eval_features = self.features(batch["image"])
            return
        if self.probed:
            self.eval_features, logits = self.net.features_and_logits(batch["image"])
        else:
            logits = self.net(batch["image"])
        labels = self.labels(batch)
        known = (labels >= 0) & (batch["id"] >= 0)
        logits, labels = logits[known].float(), labels[known]
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        values = (F.cross_entropy(logits, labels, reduction="none"), 100.0 * best[:, 0], 100.0 * best.any(1))
        for name, value in zip(METRICS, values, strict=True):
            metric: Any = self.metrics[f"{split}_{name}"]
            metric.update(value)
            self.log(f"{split}/{name}", metric, prog_bar=name == "top1", add_dataloader_idx=False)

    def token_classes(self, batch: dict[str, Any]) -> TokenClasses | None:
        return token_classes(self.net.vit, batch["image"], self.trainer.datamodule)  # type: ignore[attr-defined]

    def flops_per_sample(self) -> float:
        return 3.0 * self.net.flops_per_image()


def _first(names: list[str]) -> str:
    """Ten of these, in words."""
    return ", ".join([*names[:10], *(["..."] if len(names) > 10 else [])])
