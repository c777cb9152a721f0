"""Training images per second: our MAE and DINO against lightly's modules, in turns in one process.

    python benchmarks/lightly_modules.py [--precision bf16-mixed] [--only "MAE, 32 px"] [--out FILE]

lightly must be importable (a folder of `pip install --no-deps --target FOLDER lightly lightly_utils` on PYTHONPATH is
enough). Both sides have the same timm ViT, batch, precision and fused AdamW, and see the same images all the time, so
that modules, losses and updates are timed and no input. lightly's steps are those of its examples for MAE and DINO,
which run eagerly. Ours do what a training step of tasks.MAE and tasks.DINO does, with GELU layers of ours and with MoA,
eagerly and, with GELU, as `--model.compile true` has it.
"""

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tasks
from moa_lightning import FFNConfig
from moa_lightning.benchmarking.timing import Effort, alternate, keep_freed_memory

try:
    from lightly.loss import DINOLoss
    from lightly.models import utils
    from lightly.models.modules import (
        DINOProjectionHead,
        MaskedVisionTransformerDecoderTIMM,
        MaskedVisionTransformerTIMM,
    )
except ImportError as error:
    sys.exit(f"lightly cannot be imported ({error}); see the head of this file")

BACKBONE = "vit_small_patch16_224"
SMALL = {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "MAE, ViT-S/16, 224 px": {"image": 224, "batch": 16, "vit": {}, "decoder": (512, 8, 16)},
    "MAE, 32 px": {"image": 32, "batch": 128, "vit": SMALL, "decoder": (128, 2, 4)},
    "DINO, 32 px": {"image": 32, "batch": 64, "vit": SMALL, "local": (4, 16), "out": 4096},
    "DINO, ViT-S/16, 224 px": {"image": 224, "batch": 4, "vit": {}, "local": (6, 96), "out": 65536},
}
OURS: dict[str, dict[str, Any]] = {
    "ours, GELU": {"ffn": FFNConfig()},
    "ours, GELU, compiled": {"ffn": FFNConfig(), "compile": True},
    "ours, MoA": {"ffn": FFNConfig(mixing="moa")},
}
Loss = Callable[[], Tensor]


class Step:
    """Forward, backward, fused AdamW, and what follows the step."""

    def __init__(self, net: nn.Module, loss: Loss, precision: str, after: Callable[[], Any] | None = None) -> None:
        self.loss, self.after, self.mixed = loss, after, precision == "bf16-mixed"
        self.optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after is not None:
            self.after()


def our_mae(setting: dict[str, Any], options: dict[str, Any], precision: str) -> Step:
    dim, depth, heads = setting["decoder"]
    task = tasks.MAE(BACKBONE, setting["vit"], **options, decoder_dim=dim, decoder_depth=depth, decoder_heads=heads,
                     image_size=setting["image"], channels=3, seed=0)  # fmt: skip
    task.configure_model()
    images, seeds = _images(setting), torch.arange(setting["batch"])
    return Step(task.net, lambda: task.reconstruct(images, seeds)[0], precision)


def lightly_mae(setting: dict[str, Any], precision: str) -> Step:
    dim, depth, heads = setting["decoder"]
    vit = timm.create_model(BACKBONE, img_size=setting["image"], num_classes=0, **setting["vit"])
    patch, patches = vit.patch_embed.patch_size[0], vit.patch_embed.num_patches
    encoder = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MaskedVisionTransformerDecoderTIMM(
        num_patches=patches, embed_dim=dim, depth=depth, num_heads=heads, num_prefix_tokens=vit.num_prefix_tokens
    )
    net = nn.ModuleDict({"encoder": encoder, "embed": nn.Linear(vit.embed_dim, dim), "decoder": decoder,
                         "head": nn.Linear(dim, patch**2 * 3)})  # fmt: skip
    images, criterion = _images(setting), nn.MSELoss()

    def loss() -> Tensor:
        kept, masked = utils.random_token_mask(size=(len(images), encoder.sequence_length), mask_ratio=0.75)
        codes = net["embed"](encoder.encode(images=images, idx_keep=kept))
        tokens = codes.new_zeros(len(images), encoder.sequence_length, codes.shape[-1])
        tokens = decoder(utils.set_at_index(tokens, kept, codes), idx_mask=masked)
        predicted = net["head"](utils.get_at_index(tokens, masked))
        return criterion(predicted, utils.get_at_index(utils.patchify(images, patch), masked - 1))

    return Step(net, loss, precision)


def our_dino(setting: dict[str, Any], options: dict[str, Any], precision: str) -> Step:
    task = tasks.DINO(BACKBONE, setting["vit"], **options, out_dim=setting["out"], drop_path_rate=0.0,
                      image_size=setting["image"], channels=3, seed=0)  # fmt: skip
    task.configure_model()
    task.net.train()
    views = _views(setting)

    def loss() -> Tensor:
        student, teacher = task.net(views)
        value, _ = task.loss(student, teacher, 0.04)
        task.loss.update_center(teacher)
        return value

    return Step(task.net, loss, precision, lambda: task.net.update_teacher(0.996))


def lightly_dino(setting: dict[str, Any], precision: str) -> Step:
    vit = timm.create_model(BACKBONE, img_size=setting["image"], num_classes=0, dynamic_img_size=True, **setting["vit"])
    backbones = vit, copy.deepcopy(vit)
    student, teacher = (
        nn.Sequential(backbone, DINOProjectionHead(vit.embed_dim, 2048, 256, setting["out"])) for backbone in backbones
    )
    teacher.requires_grad_(False)
    criterion = DINOLoss(output_dim=setting["out"])
    views = _views(setting)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = [teacher(view) for view in views[:2]]
        return criterion(targets, [student(view) for view in views], teacher_temp=0.04)

    return Step(student, loss, precision, lambda: utils.update_momentum(student, teacher, m=0.996))


def _images(setting: dict[str, Any], count: int | None = None, size: int | None = None) -> Tensor:
    size = size or setting["image"]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count or setting["batch"], 3, size, size, generator=generator)


def _views(setting: dict[str, Any]) -> list[Tensor]:
    count, size = setting["local"]
    return [_images(setting)] * 2 + [_images(setting, size=size)] * count


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--only", choices=tuple(SETTINGS), action="append")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=60.0, help="of a setting, at the most")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(f"{options.precision}, {options.threads} threads, torch {torch.__version__}")
    found = {name: compare(name, options) for name in options.only or SETTINGS}
    if options.out is not None:
        about = {"precision": options.precision, "threads": options.threads, "torch": torch.__version__}
        options.out.write_text(json.dumps({**about, "found": found}, indent=1) + "\n")


def compare(name: str, options: Any) -> dict[str, Any]:
    setting = SETTINGS[name]
    theirs, ours = (lightly_mae, our_mae) if "decoder" in setting else (lightly_dino, our_dino)
    steps = {"lightly": theirs(setting, options.precision)}
    steps |= {variant: ours(setting, chosen, options.precision) for variant, chosen in OURS.items()}
    seconds = alternate(steps, Effort(rounds=30, seconds=options.seconds), torch.device("cpu"))
    found = {}
    for variant, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds["lightly"], times, strict=True)]
        speed, ratio = setting["batch"] / statistics.median(times), statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found[variant] = {"images_per_second": speed, "of_lightly": ratio, "quartiles": (low, high)}
        print(f"{name:24} {variant:20} {speed:8.1f} images/s  {ratio:.2f} x lightly ({low:.2f} to {high:.2f})")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
