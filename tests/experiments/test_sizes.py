"""Sizes that budgets are worked out from, against nets that are really built; kept, and asked for once."""

from pathlib import Path

import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid_file import load_grid
from moa_lightning.experiments.runner import Sizes
from moa_lightning.experiments.sizes import Size, measure, read_sizes
from tests.experiments.test_grid import MakeGrid

TINY = ["--model.gpt.depth=2", "--model.gpt.dim=32", "--model.gpt.num_heads=2", "--data.context_length=24"]


def test_size_of_a_language_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc " * 2000)
    data = [f"--data.source={tmp_path}/text.txt", "--data.batch_size=4", "--trainer.accumulate_grad_batches=3"]
    configs = ["-c", "configs/language/gpt_tiny.yaml", "-c", "configs/data/text_files.yaml"]
    found = measure([*configs, *data, *TINY])
    embeddings, attention, ffn, norms = 2 * 256 * 32, 2 * 4 * 32 * 32, 2 * 2 * 32 * 128, 2 * (2 * 32 + 2 * 16) + 32
    assert found.parameters == embeddings + attention + ffn + norms
    assert (found.samples_per_step, found.tokens_per_sample) == (12, 24)
    forward = 2 * (256 * 32 + attention + ffn) + 2 * (2 * 2 * 32 * 24 // 2)  # products a token, half of the attention
    assert found.flops_per_sample == 3 * 24 * forward


def test_size_of_images_follows_the_data() -> None:
    configs = ["-c", "configs/vision/mae_tiny.yaml", "-c", "configs/data/mnist5k.yaml"]
    found = measure([*configs, "--model.backbone_args.depth=1"])
    assert (found.samples_per_step, found.tokens_per_sample) == (128, None)
    assert found.flops_per_sample > 0
    wide = measure([*configs, "--model.backbone_args.depth=1", "-c", "configs/ffn/moa.yaml"])
    gates = (128 + 1) * 7 + (64 + 1) * 7  # encoder and decoder: U and alpha
    assert wide.parameters == found.parameters + gates


def test_a_step_of_dino_costs_what_its_views_cost() -> None:
    configs = ["-c", "configs/vision/dino_tiny.yaml", "-c", "configs/data/mnist5k.yaml", "--model.out_dim=8"]
    depths = {}
    for views in ([], ["--data.transform.local_crops=3"]):
        depths[len(views)] = [
            measure([*configs, *views, f"--model.backbone_args.depth={depth}"]).flops_per_sample for depth in (1, 2)
        ]
    # a block on a class token and n patches: a global view of 28 pixels has 4 patches of 14, a local one has 1
    block = {n: 2 * 12 * 128**2 * (n + 1) + 2 * 2 * 128 * (n + 1) ** 2 for n in (4, 1)}
    assert depths[0][1] - depths[0][0] == pytest.approx((3 + 1) * 2 * block[4], rel=1e-2)
    assert depths[1][1] - depths[1][0] == pytest.approx((3 + 1) * 2 * block[4] + 3 * 3 * block[1], rel=1e-2)


def test_mistakes_are_those_of_fit() -> None:
    with pytest.raises(UserError, match=r"gpt\.depht"):
        measure(["-c", "configs/language/gpt_tiny.yaml", "-c", "configs/data/stdlib.yaml", "--model.gpt.depht=1"])


def size_of(arguments: list[str]) -> Size:
    if "--absurd=1" in arguments:
        raise UserError("absurd is unknown")
    return Size(len(arguments), 1, 2, 3.0)


def test_a_size_is_asked_for_once_and_kept(make_grid: MakeGrid, tmp_path: Path) -> None:
    grid = load_grid(make_grid(), Path)
    task, variant = grid.tasks[0], grid.variants[0]
    first = Sizes(grid, size_of)(task, variant, {})
    assert first.samples_per_step == 1
    assert list(read_sizes(tmp_path / "out" / "sizes.json").values()) == [first]

    def never(arguments: list[str]) -> Size:
        raise AssertionError("it is known")

    assert Sizes(grid, never)(task, variant, {"model.optimizer.lr": "0.1"}) == first, "no size depends on a rate"
    with pytest.raises(UserError, match="absurd is unknown"):
        Sizes(load_grid(make_grid(overrides={"absurd": 1}), Path), size_of)(task, variant, {})
