"""Self-distillation without labels (Caron et al., arXiv 2104.14294): a student learns to predict, from any crop, what
an averaged teacher says of another; optionally with what DINOv2 (Oquab et al., arXiv 2304.07193) adds to it."""

import math
from typing import Any, get_args

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.losses import DINOLoss, koleo_loss
from moa_lightning.losses.centering import Centering
from moa_lightning.losses.ibot import IBOTLoss, masked_positions
from moa_lightning.masking import IBOTConfig, draw_masks
from moa_lightning.models import SelfDistillation
from moa_lightning.models.dino import MaskedOutputs
from moa_lightning.optim import DECAYING, OptimizerConfig, cosine_schedule, is_of_kind, total_norm

from .base import Recompute, as_config, check_numbers
from .vision import SelfSupervised

LONG_RUN = 10_000  # steps
MOST_PROTOTYPES = 65536  # of the official recipe, for 1.28 million images


def default_out_dim(images: int) -> int:
    """Prototypes for a training set of so many images: 1 to 20 as in the official recipe, a power of two."""
    return min(MOST_PROTOTYPES, max(256, 2 ** round(math.log2(max(images, 1) / 20))))


def default_momentum(steps: int) -> float:
    """The teacher's first momentum for a run of so many optimiser steps: a mean over a twentieth of them, but over ten
    steps at least and over 250 (the official 0.996) at most."""
    return 1 - 1 / min(250, max(10, steps / 20))


class DINO(SelfSupervised):
    """A student and an averaged teacher on a timm ViT.

    What the official recipe sets for ImageNet and hundreds of epochs is left open by default and then fits the data and
    the length of the run: prototypes, the teacher's momentum and temperature, the warm-up of the learning rate. The
    start of the log tells what was chosen. Other warm-ups are shares of the run.

    Args:
        backbone: timm model name.
        backbone_args: options for timm (embed_dim, depth, num_heads, patch_size, ...).
        ffn: feed-forward layers of student and teacher.
        out_dim: prototypes of the head; None: about one for twenty training images, see `default_out_dim`.
        head_hidden_dim, head_bottleneck_dim: widths inside the head.
        norm_last_layer: hold the prototypes' norms at 1.
        drop_path_rate: of the student.
        student_temperature: divides the student's outputs.
        teacher_temperature: divides the teacher's outputs after its warm-up; None: 0.07 from 10,000 steps on,
            as in the official one, otherwise 0.04.
        teacher_temperature_start: at the first step, rising linearly.
        teacher_temperature_warmup: share of the run over which it rises.
        freeze_last_layer: share of the run during which the last layer stands still.
        teacher_momentum: weight of the old teacher at the first step; rises to 1 along a cosine. None: it averages
            over a twentieth of the run at most, and 0.996 from 5,000 steps on.
        center_momentum: weight of the old centre.
        centering: what keeps the teacher from saying the same of every image: "mean" takes a running mean of its
            outputs away, "sinkhorn_knopp" shares a batch out evenly over the prototypes, as in DINOv2's long recipes.
        ibot: the masked-patch loss of iBOT as in DINOv2; None: without.
        koleo_weight: of KoLeo on the student's features of the global crops, as in DINOv2 (there 0.1).
        clip_per_parameter: clip the gradient of each parameter to trainer.gradient_clip_val by itself, as the official
            code does, instead of all of them as one vector.
        layer_decay: each layer of the backbone learns at this share of the rate of the layer above (0.9 in DINOv2's
            recipe for ImageNet-1k); 1: all alike.
        patch_embed_rate: of the patch embedding, in units of what its layer has (0.2 in DINOv2).
        final_weight_decay: weight decay at the end of the run, reached along a cosine; None: constant.
        backbone_weights: what the encoder starts from: a run's folder or a checkpoint of MAE, DINO or
            ImageClassification, what moa export wrote, or a file of timm's, MAE's or DINO's own weights. None: from
            scratch.
        optimizer: AdamW or Muon, and the schedule; its warmup_steps None: a tenth of the run.
        image_size: pixels of the global crops; None: the data's.
        channels: of the images; None: the data's.
        seed: of the initial weights; None: the run's seed.
        compile: compile each transformer block.
        activation_checkpointing: recompute each block in the backward pass instead of storing its activations;
            "selective" keeps its matrix products and attention and recomputes the rest.
        weights_from: a run's folder or a checkpoint whose weights the net starts with; what LA or MoA adds to a fixed
            activation begins at the identity start, where the net computes what it computed there.
    """

    forward_methods = ("features", "masked")
    open_options = (*SelfSupervised.open_options, "out_dim", "teacher_momentum", "teacher_temperature")

    def __init__(
        self,
        backbone: str = "vit_small_patch16_224",
        backbone_args: dict[str, Any] | None = None,
        ffn: FFNConfig = FFNConfig(),  # noqa: B008 - frozen
        out_dim: int | None = None,
        head_hidden_dim: int = 2048,
        head_bottleneck_dim: int = 256,
        norm_last_layer: bool = True,
        drop_path_rate: float = 0.1,
        student_temperature: float = 0.1,
        teacher_temperature: float | None = None,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup: float = 0.3,
        freeze_last_layer: float = 0.01,
        teacher_momentum: float | None = None,
        center_momentum: float = 0.9,
        centering: Centering = "mean",
        ibot: IBOTConfig | None = None,
        koleo_weight: float = 0.0,
        clip_per_parameter: bool = False,
        layer_decay: float = 1.0,
        patch_embed_rate: float = 1.0,
        final_weight_decay: float | None = 0.4,
        backbone_weights: str | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, weight_decay=0.04, warmup_steps=None),  # noqa: B008
        image_size: int | None = None,
        channels: int | None = None,
        seed: int | None = None,
        compile: bool = False,
        activation_checkpointing: Recompute = False,
        weights_from: str | None = None,
    ) -> None:
        super().__init__(optimizer, seed, compile, activation_checkpointing, weights_from)
        self.ffn = as_config(FFNConfig, ffn)
        self.ibot = None if ibot is None else as_config(IBOTConfig, ibot)
        if centering not in get_args(Centering):
            raise UserError(f"model.centering is '{centering}'; choose from {', '.join(get_args(Centering))}")
        check_numbers("[2, inf)", out_dim=out_dim)
        check_numbers("[1, inf)", head_hidden_dim=head_hidden_dim, head_bottleneck_dim=head_bottleneck_dim)
        check_numbers(
            "(0, inf)",
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            teacher_temperature_start=teacher_temperature_start,
        )
        check_numbers("[0, 1)", drop_path_rate=drop_path_rate, freeze_last_layer=freeze_last_layer)
        check_numbers(
            "[0, 1]",
            teacher_temperature_warmup=teacher_temperature_warmup,
            teacher_momentum=teacher_momentum,
            center_momentum=center_momentum,
        )
        check_numbers("[0, inf)", koleo_weight=koleo_weight, final_weight_decay=final_weight_decay)
        check_numbers("(0, 1]", layer_decay=layer_decay, patch_embed_rate=patch_embed_rate)
        self.keep_hyperparameters(
            locals(), backbone_args=backbone_args or {}, ffn=self.ffn, ibot=self.ibot, optimizer=self.optimizer_config
        )
        self.loss: Any = None
        self.patch_loss: Any = None
        self.view_sizes: list[int] = []
        self._student_features: Tensor | None = None
        self._images = 0  # in the batch that is going through the net

    def choose(self) -> None:
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_run()
        if self.hparams["out_dim"] is None:
            images = 0 if self._trainer is None else self.data.train_samples
            if not images:
                raise UserError(
                    "out_dim is open, and no training images are there that say it: give model.init_args.out_dim"
                )
            self._choose("out_dim", default_out_dim(images))
        h = self.hparams
        how = h["student_temperature"], h["center_momentum"], h["centering"]
        self.loss = DINOLoss(h["out_dim"], *how)
        if self.ibot is not None:
            self.patch_loss = IBOTLoss(self.ibot.out_dim or h["out_dim"], *how)

    def _check_run(self) -> None:
        """UserError where a fit could not train the net."""
        if self.trainer.precision == "bf16-true":
            raise UserError(
                "DINO needs float32 weights, as its teacher moves by less than bfloat16 can tell: set "
                "trainer.precision to bf16-mixed"
            )

    def choose_schedules(self) -> None:
        steps = self.total_steps
        if self.hparams["teacher_momentum"] is None:
            self._choose("teacher_momentum", default_momentum(steps))
        if self.hparams["teacher_temperature"] is None:
            self._choose("teacher_temperature", 0.07 if steps >= LONG_RUN else 0.04)

    def _choose(self, name: str, value: Any) -> None:
        """Fill in an option that was left open; the start of the log says so, and the checkpoint holds it."""
        self.chosen[name] = self.hparams[name] = value

    def build(self, seed: int) -> nn.Module:
        h = self.hparams
        net = SelfDistillation(
            h["backbone"],
            h["backbone_args"],
            self.ffn,
            self.from_data("image_size"),
            self.from_data("channels"),
            h["out_dim"],
            h["head_hidden_dim"],
            h["head_bottleneck_dim"],
            h["norm_last_layer"],
            h["drop_path_rate"],
            seed,
            self.ibot,
        )
        self.load_weights(net.student.backbone, net.teacher.backbone)
        return net

    def watch(self) -> None:
        """Features on their way into the heads: the teacher's of the first global crop to be watched, the student's
        of all crops for KoLeo."""

        def keep_teacher(head: nn.Module, inputs: tuple[Tensor]) -> None:
            self.train_features = inputs[0].detach()[: self._images]

        def keep_student(head: nn.Module, inputs: tuple[Tensor]) -> None:
            self._student_features = inputs[0]

        self.net.teacher.head.register_forward_pre_hook(keep_teacher)
        if self.hparams["koleo_weight"]:
            self.net.student.head.register_forward_pre_hook(keep_student)

    def koleo(self) -> Tensor:
        """KoLeo of the last forward pass, summed over the two global crops."""
        features, self._student_features = self._student_features, None  # kept longer, it would hold the whole graph
        assert features is not None
        crops = features[: 2 * self._images].split(self._images)
        return sum((koleo_loss(crop) for crop in crops), features.new_zeros(()))

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Draw the masks of a training batch while its seeds lie on the host: how many patches they hide is then known
        there, and the device need not be waited for."""
        if self.ibot is None or "views" not in batch:
            return batch
        embed = self.net.student.backbone.patch_embed
        rows, columns = embed.dynamic_feat_size(batch["views"][0].shape[-2:])
        mask = draw_masks(batch["seed"].tolist(), rows, columns, self.ibot)
        tensors = [torch.from_numpy(array) for array in (mask, *masked_positions(mask))]
        if self.device.type == "cuda":  # what is not pinned is waited for when it travels
            tensors = [tensor.pin_memory() for tensor in tensors]
        return batch | dict(zip(("mask", "masked", "masked_weights"), tensors, strict=True))

    def outputs(self, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """What the net makes of a training batch: student and teacher, with masks also of the hidden patches."""
        self._images = len(batch["views"][0])
        if self.ibot is None:
            return self.net(batch["views"])
        masked: MaskedOutputs = self.net.masked(batch["views"], batch["mask"], batch["masked"])
        return masked

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        if len(batch["views"]) < 2:
            raise UserError("DINO needs at least two views of an image: set data.init_args.transform to MultiCrop")
        self.view_sizes = [view.shape[-1] for view in batch["views"]]
        student, teacher, *patches = self.outputs(batch)
        temperature = self.teacher_temperature()
        loss, entropy = self.loss(student, teacher, temperature)
        self.loss.note(teacher)
        parts = {"dino": loss}
        if self.ibot is not None:
            parts["ibot"] = self.patch_loss(*patches, batch["masked_weights"], temperature)
            self.patch_loss.note(patches[1])
            loss = loss + self.ibot.weight * parts["ibot"]
        weight = self.hparams["koleo_weight"]
        if weight:
            parts["koleo"] = self.koleo()
            loss = loss + weight * parts["koleo"]
        for name, part in parts.items() if len(parts) > 1 else ():
            self.log(f"train/{name}", part.detach(), sync_dist=True)
        self.log("train/loss", loss.detach(), sync_dist=True)
        largest = math.log(self.hparams["out_dim"])
        self.log("train/teacher_entropy", entropy / largest, sync_dist=True)
        self.log("train/prototype_entropy", self.loss.mean_entropy / largest, sync_dist=True)
        return loss

    def mix_forward(self, batch: dict[str, Any]) -> None:
        self.outputs(batch)

    def learning_rates(self) -> dict[str, float] | None:
        shares = self.hparams["layer_decay"], self.hparams["patch_embed_rate"]
        return None if shares == (1.0, 1.0) else self.net.layer_rates(*shares)

    def evaluated_backbone(self) -> Any:
        return self.net.teacher.backbone

    def trunk(self) -> nn.Module:
        return self.net.student.backbone

    def teacher_temperature(self) -> float:
        h = self.hparams
        warmup = h["teacher_temperature_warmup"]
        rise = min(1.0, self.progress / warmup) if warmup else 1.0
        return h["teacher_temperature_start"] + rise * (h["teacher_temperature"] - h["teacher_temperature_start"])

    def _centered(self) -> list[Any]:
        """The losses with a centre."""
        return [self.loss] if self.ibot is None else [self.loss, self.patch_loss]

    def on_train_start(self) -> None:
        super().on_train_start()
        for loss in self._centered():
            loss.forget()  # a fit that was broken off between two micro-batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for loss in self._centered():
            loss.move_center()  # once a step, however many micro-batches it has
        if self.progress < self.hparams["freeze_last_layer"]:
            student = self.net.student
            for head in filter(None, (student.head, student.patch_head)):
                for parameter in head.last_layer.parameters():
                    parameter.grad = None
        final = self.hparams["final_weight_decay"]
        if final is not None:
            decay = cosine_schedule(self.optimizer_config.weight_decay, final, self.progress)
            for group in optimizer.param_groups:
                if is_of_kind(group["name"], DECAYING, self.domain):
                    group["weight_decay"] = decay

    def clip_norm(self, parameters: list[nn.Parameter], largest: float, norm: Tensor) -> None:
        if not self.hparams["clip_per_parameter"]:
            super().clip_norm(parameters, largest, norm)
            return
        for parameter in parameters:
            if parameter.grad is not None:
                torch.nn.utils.clip_grads_with_norm_([parameter], largest, total_norm([parameter.grad]))

    def before_step(self) -> float:
        """The teacher's momentum."""
        return cosine_schedule(self.hparams["teacher_momentum"], 1.0, self.progress)

    def after_step(self, before: float | None) -> None:
        assert before is not None
        self.net.update_teacher(before)

    def flops_per_sample(self) -> float:
        share = 0.0 if self.ibot is None else self.ibot.masked_share
        student, teacher = self.net.flops_per_image(self.view_sizes, share)
        return 3.0 * student + teacher  # nothing goes back through the teacher
