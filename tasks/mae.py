"""Masked autoencoding of images (He et al., arXiv 2111.06377): hide three quarters of the patches, predict their
pixels."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from moa_lightning import FFNConfig
from moa_lightning.evaluation.pictures import cells
from moa_lightning.losses import masked_pixel_loss, unpatchify
from moa_lightning.models import MaskedAutoencoder
from moa_lightning.optim import OptimizerConfig
from moa_lightning.random import uniform

from .base import Recompute, as_config, check_numbers
from .vision import PICTURES, SelfSupervised, picture

MASK_STREAM = 1  # separates the masks from other uses of a sample's seed


class MAE(SelfSupervised):
    """A masked autoencoder on a timm ViT.

    Args:
        backbone: timm model name.
        backbone_args: options for timm (embed_dim, depth, num_heads, patch_size, ...).
        ffn: feed-forward layers of the encoder.
        decoder_ffn: feed-forward layers of the decoder; None: as the encoder's.
        mask_ratio: share of patches hidden.
        normalize_pixels: predict pixels standardised per patch.
        decoder_dim, decoder_depth, decoder_heads: size of the decoder.
        backbone_weights: what the encoder starts from: a run's folder or a checkpoint of MAE, DINO or
            ImageClassification, what moa export wrote, or a file of timm's, MAE's or DINO's own weights. None: from
            scratch.
        optimizer: AdamW or Muon, and the schedule.
        image_size: pixels; None: the data's.
        channels: of the images; None: the data's.
        seed: of the initial weights; None: the run's seed.
        compile: compile each transformer block.
        activation_checkpointing: recompute each block in the backward pass instead of storing its activations;
            "selective" keeps its matrix products and attention and recomputes the rest.
        weights_from: a run's folder or a checkpoint whose weights the net starts with; what LA or MoA adds to a fixed
            activation begins at the identity start, where the net computes what it computed there.
    """

    def __init__(
        self,
        backbone: str = "vit_small_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        ffn: FFNConfig = FFNConfig(),  # noqa: B008 - frozen
        decoder_ffn: FFNConfig | None = None,
        mask_ratio: float = 0.75,
        normalize_pixels: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        backbone_weights: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        image_size: int | None = None,
        channels: int | None = None,
        seed: int | None = None,
        compile: bool = False,
        activation_checkpointing: Recompute = False,
        weights_from: str | None = None,
    ) -> None:
        super().__init__(optimizer, seed, compile, activation_checkpointing, weights_from)
        check_numbers("[1, inf)", decoder_dim=decoder_dim, decoder_depth=decoder_depth, decoder_heads=decoder_heads)
        self.ffn = as_config(FFNConfig, ffn)
        self.decoder_ffn = self.ffn if decoder_ffn is None else as_config(FFNConfig, decoder_ffn)
        self.normalize_pixels = normalize_pixels
        self.keep_hyperparameters(
            locals(),
            backbone_args=backbone_args or {},
            ffn=self.ffn,
            decoder_ffn=decoder_ffn if decoder_ffn is None else self.decoder_ffn,
            optimizer=self.optimizer_config,
        )
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def build(self, seed: int) -> nn.Module:
        h = self.hparams
        net = MaskedAutoencoder(
            h["backbone"],
            h["backbone_args"],
            self.ffn,
            self.decoder_ffn,
            self.from_data("image_size"),
            self.from_data("channels"),
            h["mask_ratio"],
            h["decoder_dim"],
            h["decoder_depth"],
            h["decoder_heads"],
            seed,
        )
        self.load_weights(net.encoder)
        return net

    def watch(self) -> None:
        """The mean of the visible patches, on their way into the decoder."""

        def keep(decoder: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.training:
                self.train_features = inputs[1].detach().mean(1)

        self.net.decoder.register_forward_pre_hook(keep)

    def reconstruct(self, images: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, predicted patches (B, N, p²·C; in training 0 where visible) and mask (B, N), drawn from the samples'
        seeds (B,)."""
        # outside training all patches are computed, as what the mixes do is looked at there; shuffled gates are those
        # of the token in the same place of another sample, which has to be there
        visible = not self.training or self.decoder_ffn.gates == "shuffled"
        predicted, mask = self.net(images, uniform(seeds, self.net.num_patches, MASK_STREAM), visible=visible)
        target = self.net.patchify(images)
        return masked_pixel_loss(predicted, target, mask, self.normalize_pixels), predicted, mask

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        loss, _, _ = self.reconstruct(batch["views"][0], batch["seed"])
        self.log("train/loss", loss.detach(), sync_dist=True)
        return loss

    def mix_forward(self, batch: dict[str, Any]) -> None:
        self.reconstruct(batch["views"][0], batch["seed"])

    def evaluated_backbone(self) -> Any:
        return self.net.encoder

    def trunk(self) -> nn.Module:
        return self.net.encoder

    def evaluate_query(self, batch: dict[str, Any], split: str) -> None:
        """The loss, each sample counted once over all processes.

        Lightning's own mean over an epoch halves the sample count in whole numbers between two processes, so 33
        samples became 32; hence a metric of its own.
        """
        loss, _, _ = self.reconstruct(batch["image"], batch["seed"])
        metric = self.val_loss if split == "val" else self.test_loss
        # a batch without counted samples is the padding of a process that has none left
        metric.update(loss, (batch["id"] >= 0).sum())
        self.log(f"{split}/loss", metric, add_dataloader_idx=False)

    def flops_per_sample(self) -> float:
        return 3.0 * self.net.flops_per_image()

    @torch.no_grad()
    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Besides what all encoders show: what the encoder sees, the reconstruction (visible patches as given), the
        image."""
        images, seeds = batch["image"][:PICTURES], batch["seed"][:PICTURES]
        with self.trainer.precision_plugin.forward_context():
            _, predicted, mask = self.reconstruct(images, seeds)
        target = self.net.patchify(images)
        predicted = predicted.to(target.dtype)
        if self.normalize_pixels:
            deviation = (target.var(-1, keepdim=True) + 1e-6).sqrt()
            predicted = predicted * deviation + target.mean(-1, keepdim=True)
        hidden = mask[:, :, None].to(target.dtype)
        rows = [target * (1 - hidden), target * (1 - hidden) + predicted * hidden, target]
        data = self.data
        grid = self.net.encoder.patch_embed.grid_size
        shown = [picture(unpatchify(row, self.net.patch_size, *grid), data.mean, data.std) for row in rows]
        return {"reconstruction": cells(shown), **super().pictures(batch)}
