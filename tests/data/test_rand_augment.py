"""RandAugment: timm's operations, drawn from the sample's own seed and from nothing else."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from data import Images, RandAugment
from data.rand_augment import python_seeded
from data.transforms import seeded
from moa_lightning.errors import UserError

PICTURE = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def views(seeds: range, image: torch.Tensor = PICTURE, **options: object) -> list[torch.Tensor]:
    (view,) = RandAugment(**{"scale": (1.0, 1.0), "flip": 0.0, **options}).build(40)
    found = []
    for seed in seeds:
        with seeded(seed):
            found.append(view(image))
    return found


def test_it_does_what_timms_own_transform_does_with_the_same_numbers() -> None:
    official = create_transform(
        40, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", color_jitter=None
    )
    (change,) = [t for t in official.transforms if type(t).__name__ == "RandAugment"]
    changed = 0
    for seed, view in enumerate(views(range(40))):
        with seeded(seed):
            torch.rand(36)  # the crop's numbers
            with python_seeded(int(torch.randint(2**31, ()))):
                expected = np.array(change(Image.fromarray(PICTURE.permute(1, 2, 0).numpy())))
        assert torch.equal(view.permute(1, 2, 0), torch.from_numpy(expected))
        changed += int(not torch.equal(view, PICTURE))
    assert 20 < changed < 40  # of two operations each is left out half of the time


def test_a_view_is_a_function_of_its_seed_and_leaves_all_generators_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist())
    first = views(range(8))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    random.seed(2)
    np.random.seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, views(range(8)), strict=True))
    assert len({view.numpy().tobytes() for view in first}) > 4


def test_grey_images_stay_grey_and_equal_to_what_colour_would_be() -> None:
    grey = views(range(20), PICTURE[:1])
    assert {tuple(view.shape) for view in grey} == {(1, 40, 40)}
    colour = views(range(20), PICTURE[:1].expand(3, -1, -1))
    for one, three in zip(grey, colour, strict=True):
        assert (one.double() - three.double().mean(0)).abs().mean() < 4  # filled corners are not quite grey


def test_a_policy_that_timm_does_not_know_is_refused() -> None:
    for policy in ("random", "rand-m9-x1"):
        with pytest.raises(UserError, match="policy"):
            RandAugment(policy)


def test_a_data_module_makes_batches_of_it() -> None:
    module = Images(batch_size=8, transform=RandAugment(flip=0.0), seed=1)
    module.setup()
    first, again = (next(iter(module.train_dataloader()))["views"][0] for _ in range(2))
    assert first.shape == (8, 1, 28, 28)
    assert torch.equal(first, again)
