"""Corruptions against their formulas, Pillow and torchvision; and that they depend on the sample alone."""

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import rotate

from data import Images
from data.corruptions import CORRUPTIONS, GROUPS, corruption_names
from data.transforms import seeded
from moa_lightning.errors import UserError


def corrupted(name, image, severity=3, seed=0):
    with seeded(seed):
        return CORRUPTIONS[name](image, severity - 1)


def photograph(side=64):
    """Smooth, in three channels, of values well inside (0, 1)."""
    rows, columns = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 2, side), indexing="ij")
    return torch.stack([0.5 + 0.3 * torch.sin(rows + i) * torch.cos(2 * columns) for i in range(3)])


def test_fifteen_corruptions_in_four_groups_and_shifts():
    assert len(corruption_names("all", 1)) == 15
    assert [len(names) for names in GROUPS.values()] == [3, 4, 4, 4, 3]
    assert corruption_names("fog", 5) == ("fog",)
    with pytest.raises(UserError, match="corruption 'fogg' is unknown; choose from gaussian_noise"):
        Images(corruption="fogg")
    for options in ({"corruption": "fog"}, {}):
        with pytest.raises(UserError, match="severity is 6: give a strength from 1 to 5"):
            Images(severity=6, **options)
    with pytest.raises(UserError, match="severity is 5 and there is no corruption"):
        Images(severity=5)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_keeps_the_shape_and_changes_the_image(name):
    for side, channels in ((28, 1), (40, 3)):
        image = photograph(side)[:channels]
        for severity in (1, 5):
            result = corrupted(name, image, severity)
            assert result.shape == image.shape
            assert result.isfinite().all()
            assert not torch.equal(result, image)


ALIKE = {
    "glass_blur": (1, 4),  # 2 and 3 move pixels as far as 1 does, and blur them more
    "frost": (1, 2, 3, 5),  # 4 has as much ice as 3
}


@pytest.fixture(scope="module")
def digits():
    test = Images().read()["test"].images
    return [test[i] / 255 for i in range(12)]


@pytest.mark.parametrize("name", [n for n in CORRUPTIONS if n not in ("elastic_transform", "pixelate")])
def test_a_higher_severity_changes_more(digits, name):
    """On average over images; the authors' elastic transform is smaller and rougher at its higher strengths."""
    changes = [
        np.mean([(corrupted(name, x, s, i).clamp(0, 1) - x).abs().mean() for i, x in enumerate(digits)])
        for s in ALIKE.get(name, (1, 2, 3, 4, 5))
    ]
    assert changes == sorted(changes)
    assert changes[-1] > 1.1 * changes[0]


def test_noises_have_their_published_strength():
    image = torch.full((3, 200, 200), 0.4)
    assert corrupted("gaussian_noise", image, 4).std() == pytest.approx(0.09, rel=0.02)
    assert corrupted("shot_noise", image, 5).var() == pytest.approx(0.4 / 50, rel=0.02)
    speckled = corrupted("impulse_noise", image, 5)
    assert (speckled == 1).float().mean() == pytest.approx(0.035, rel=0.05)
    assert (speckled == 0).float().mean() == pytest.approx(0.035, rel=0.05)


@pytest.mark.parametrize("name", [*GROUPS["blur"], *GROUPS["shift"], "contrast", "pixelate", "elastic_transform"])
def test_an_even_image_stays_even(name):
    image = torch.full((3, 32, 32), 0.3)
    assert torch.allclose(corrupted(name, image, 5), image, atol=1e-5)


def test_brightness_adds_to_the_value_of_hsv():
    image = photograph(8)
    image[:, 0, 0] = 0
    expected = torch.zeros_like(image)
    for i in range(8):
        for j in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*image[:, i, j].tolist())
            expected[:, i, j] = torch.tensor(colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + 0.2)))
    assert torch.allclose(corrupted("brightness", image, 4), expected, atol=1e-5)


def test_pixelate_is_pillows_box_filter():
    side, share = 40, 0.75
    pixels = (photograph(side)[0] * 255).round()
    picture = Image.fromarray(pixels.numpy().astype(np.float32))
    small = picture.resize((int(side * share),) * 2, Image.Resampling.BOX)
    ours = corrupted("pixelate", pixels[None] / 255, 4)[0] * 255
    theirs = torch.from_numpy(np.array(small.resize((side, side), Image.Resampling.BOX)))
    assert (ours - theirs).abs().mean() < 2  # areas against pixels whose centre lies inside


def test_shifts_move_as_they_say():
    image = photograph(64)
    with seeded(0):
        angle = 2 * math.pi * float(torch.rand(()))
    right, down = (round(0.08 * 64 * part) for part in (math.cos(angle), math.sin(angle)))
    moved = corrupted("translation", image, 2)
    inside = slice(12, 52)
    expected = torch.roll(image, (-down, -right), (1, 2))
    assert (moved - expected)[:, inside, inside].abs().max() < 0.03
    turned = corrupted("rotation", image, 3)
    expected = [rotate(image, angle, InterpolationMode.BILINEAR) for angle in (30, -30)]
    assert min((turned - each)[:, inside, inside].abs().max() for each in expected) < 0.01
    assert torch.allclose(corrupted("shrinking", image, 5)[:, 17:47, 17:47], image[:, 3:63:2, 3:63:2], atol=0.03)


def test_only_held_out_images_suffer_and_each_alike_in_every_run():
    def batches(**options):
        module = Images("mnist5k", max_val_samples=30, bank_size=20, **options)
        module.setup()
        bank, query = module.val_dataloader()
        first = next(iter(module.train_dataloader()))["views"][0]
        return first, *(torch.cat([batch["image"] for batch in loader]) for loader in (bank, query)), module

    train, bank, query, _ = batches(batch_size=10)
    same, clean, seen, module = batches(batch_size=10, corruption="all", severity=4)
    assert torch.equal(same, train)
    assert torch.equal(clean, bank)
    assert ((seen - query).abs().amax((1, 2, 3)) > 1e-3).all()
    assert module.describe()["corruption"] == "all, severity 4"
    again = batches(batch_size=7, seed=5, corruption="all", severity=4)[2]
    assert torch.equal(again, seen)
