"""What the self-supervised vision tasks share: the k-NN accuracy, rank and spread of features of held-out images, and
the features that callbacks watch.

The data module's evaluation loaders are [bank, query]: labelled training images to compare with, held-out images to
classify.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moa_lightning.errors import UserError
from moa_lightning.evaluation import FeatureSpectrum, KNNAccuracy
from moa_lightning.evaluation.pictures import attention_rows, cells, framed, nearest, patch_colours, resized
from moa_lightning.evaluation.token_classes import TokenClasses, patch_classes
from moa_lightning.exchange.pretrained import load_encoder, no_weights
from moa_lightning.models.attention import look
from moa_lightning.models.vit import is_plain
from moa_lightning.run_folder import given_checkpoint

from .base import Task

BANK, QUERY = 0, 1
PICTURES = 8


class SelfSupervised(Task):
    """Base of MAE and DINO: features of the net are judged by k-NN (k = 20, T = 0.07, as DINO evaluates).

    `watch` has the net leave the features of a training step.

    Attributes:
        train_features: detached (B, D), what the last training step computed of the batch anyway; its callbacks' input.
        eval_features: (B, D) of the last evaluated batch.
    """

    open_options: tuple[str, ...] = ("image_size", "channels")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.knn = KNNAccuracy()
        self.train_features: Tensor | None = None
        self.eval_features: Tensor | None = None
        self.spectrum = FeatureSpectrum()
        self._bank_features: list[Tensor] = []  # of the last validation: (n, D) and (n,)
        self._bank_ids: list[Tensor] = []
        self.missing_weights: str | None = None

    def load_weights(self, *encoders: Any) -> None:
        """Put `backbone_weights` into vision transformers, in place. A file that is gone is only noted: a run that goes
        on, or is evaluated, has its weights in its checkpoint."""
        file = self.hparams["backbone_weights"]
        self.missing_weights = None if file is None or given_checkpoint(file) is not None else file
        if file is not None and self.missing_weights is None:
            self.starts = [load_encoder(encoder, file) for encoder in encoders][:1]

    def shapeless(self, options: Mapping[str, Any]) -> dict[str, Any]:
        heads = (options.get("backbone_args") or {}).get("num_heads")
        return {"backbone_args.num_heads": heads, "decoder_heads": options.get("decoder_heads")}

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.global_step == 0 and self.missing_weights is not None:
            file = self.missing_weights
            raise UserError(no_weights(file))

    def features(self, images: Tensor) -> Tensor:
        """Frozen features of images (B, C, H, W) -> (B, D)."""
        return self.net.features(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        self._collect(batch, dataloader_idx)
        if dataloader_idx == QUERY:
            self.evaluate_query(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        self._collect(batch, dataloader_idx)
        if dataloader_idx == QUERY:
            self.evaluate_query(batch, "test")

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """Features (B, D) of the images, with their ids and labels."""
        return {"id": batch["id"], "label": batch["label"], "features": self.features(batch["image"])}

    def token_classes(self, batch: dict[str, Any]) -> TokenClasses | None:
        return token_classes(self.evaluated_backbone(), batch["image"], self.data)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Where the last block looks, a row a head; the patches as colours; the images of the bank that are nearest."""
        backbone = self.evaluated_backbone()
        if not is_plain(backbone):
            return {}
        images, data = batch["image"][:PICTURES], self.data
        with self.trainer.precision_plugin.forward_context():
            seen = look(backbone, images, self.net.features)
        shown, size = picture(images, data.mean, data.std), images.shape[-2:]
        pictures = {}
        if bool(seen.patches.isfinite().all()):  # a net that diverges has no components; the guard ends its run
            pictures["patches"] = cells([shown, patch_colours(seen.patches, size)])
        if seen.attention is not None:
            pictures["attention"] = cells([shown, *attention_rows(seen.attention, size)])
        if self._bank_ids:
            pictures["neighbours"] = self._neighbours(shown, seen.features, batch["label"])
        return pictures

    def _neighbours(self, shown: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Rows: an image, then its nearest ones of this process's part of the bank, framed by whether the class is the
        same."""
        bank, ids = torch.cat(self._bank_features), torch.cat(self._bank_ids)
        samples, rows = self.data.splits["bank"], []
        for image, label, found in zip(shown, labels.tolist(), nearest(features.cpu(), bank), strict=False):
            near = [samples.sample(index, 0, 0) for index in ids[found].tolist()]
            pixels = torch.stack([sample["views"][0] for sample in near]) / 255
            classes = torch.tensor([sample["label"] for sample in near])
            same = classes == label if label >= 0 else None
            framed_ones = framed(pixels.expand(-1, 3, -1, -1), same)
            rows.append(torch.cat([resized(image[None]), framed_ones]))
        return cells(rows)

    def evaluated_backbone(self) -> Any:
        """The vision transformer whose features are judged."""
        raise TypeError(f"{type(self).__name__} does not name its backbone")

    def evaluate_query(self, batch: dict[str, Any], split: str) -> None:
        """What a task measures on held-out images besides k-NN."""

    def _collect(self, batch: dict[str, Any], loader: int) -> None:
        self.eval_features = features = self.features(batch["image"])
        if loader == QUERY:
            self.spectrum.update(features[batch["id"] >= 0])
        if loader == BANK and self.trainer.state.fn == TrainerFn.FITTING:
            counted = batch["id"] >= 0
            self._bank_features.append(features[counted].float().cpu())
            self._bank_ids.append(batch["id"][counted].cpu())
        if loader == BANK:
            self.knn.add_bank(features, batch["label"])
        else:
            self.knn.update(features, batch["label"])

    def on_validation_epoch_start(self) -> None:
        self._bank_features, self._bank_ids = [], []

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        accuracy = self.knn.compute()
        self.knn.reset()
        if not torch.isnan(accuracy):
            self.log(f"{split}/knn_top1", accuracy, prog_bar=True, sync_dist=True)
        figures = self.spectrum.compute()
        self.spectrum.reset()
        for name, value in figures.items():
            self.log(f"{split}/{name}", value.float(), sync_dist=True)


def token_classes(backbone: Any, images: Tensor, data: Any) -> TokenClasses | None:
    """Patches of normalised images (n, C, H, W); None where the backbone makes no sequence of separate ones."""
    if not is_plain(backbone):
        return None
    patch, prefix = int(backbone.patch_embed.patch_size[0]), int(backbone.num_prefix_tokens)
    return patch_classes(picture(images, data.mean, data.std), patch, prefix)


def picture(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised images (n, C, H, W) -> (n, 3, H, W) in [0, 1] on the CPU."""
    shape = (1, -1, 1, 1)
    images = images.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return images.clamp(0, 1).expand(-1, 3, -1, -1)
