"""Views depend on (seed, epoch, sample) alone and follow the recipes."""

import math
import random

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data import Images, MultiCrop, SingleView
from data.transforms import RandomView, crop_box, jitter, plain_view, seeded
from moa_lightning.errors import UserError

IMAGE = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batches(module, count=2):
    module.setup()
    loader = iter(module.train_dataloader())
    return [next(loader) for _ in range(count)]


def digits(**options):
    return Images(batch_size=16, transform=MultiCrop(local_crops=2, local_size=12), seed=5, **options)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a["views"], b["views"], strict=True)) and torch.equal(a["id"], b["id"])


def test_views_do_not_depend_on_workers():
    for alone, shared in zip(batches(digits()), batches(digits(num_workers=2)), strict=True):
        assert equal(alone, shared)


def test_views_do_not_depend_on_the_world_size(as_rank):
    whole = batches(as_rank(digits()))
    ranks = [batches(as_rank(digits(), rank, 2)) for rank in (0, 1)]
    for t, batch in enumerate(whole):
        first, second = ranks[0][t], ranks[1][t]
        joined = {
            "id": torch.cat([first["id"], second["id"]]),
            "views": [torch.cat(pair) for pair in zip(first["views"], second["views"], strict=True)],
        }
        assert equal(joined, batch)


def test_views_differ_between_epochs_and_seeds(as_rank):
    module = digits()
    module.setup()
    views = [module.splits["train"][key]["views"][0] for key in ((0, 7), (1, 7), (0, 7))]
    assert torch.equal(views[0], views[2])
    assert not torch.equal(views[0], views[1])
    other = Images(batch_size=16, transform=MultiCrop(local_crops=2, local_size=12), seed=6)
    other.setup()
    assert not torch.equal(other.splits["train"][(0, 7)]["views"][0], views[0])


def test_drawing_views_leaves_all_generators_alone():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    with seeded(3):
        for view in MultiCrop(local_size=16, jitter=1, grayscale=1, blur=(1, 1, 1), solarize=1).build(32):
            view(IMAGE)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_seeded_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(3):
        torch.rand(2, 3) @ torch.rand(2, 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_views_come_globals_first_with_their_sizes():
    views = [view(IMAGE) for view in MultiCrop(local_crops=3, local_size=16).build(32)]
    assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 3
    assert {view.dtype for view in views} == {torch.uint8}
    assert [tuple(view(IMAGE[:1]).shape) for view in SingleView().build(28)] == [(1, 28, 28)]


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(40, 40, (0.2, 1.0)), (30, 60, (0.05, 0.4)), (20, 90, (0.4, 1.0))]
)
def test_crops_have_the_distribution_of_torchvision(height, width, scale):
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(10, scale)
    image = torch.zeros(1, height, width)
    theirs = [reference.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in theirs]).double()
    ours = torch.tensor([crop_box(height, width, scale, lambda: torch.rand(()).item()) for _ in range(4000)]).double()
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width
    spread = (ours.std(0) + theirs.std(0)) / 2
    assert (
        (ours.mean(0) - theirs.mean(0)).abs() <= 5 * spread * (2 / 4000) ** 0.5 + 1e-9
    ).all()  # five standard errors
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.08, atol=1e-6)


def test_the_ratio_of_sides_is_log_uniform():
    torch.manual_seed(0)
    boxes = torch.tensor([crop_box(900, 900, (0.1, 0.3), lambda: torch.rand(()).item()) for _ in range(5000)]).double()
    log_ratio = (boxes[:, 3] / boxes[:, 2]).log()
    half = math.log(4 / 3)
    assert abs(log_ratio.mean()) < 5 * half / math.sqrt(3 * 5000)
    assert abs(log_ratio.std() - half / math.sqrt(3)) < 0.005
    assert log_ratio.abs().max() < half + 0.01


def test_each_operation_acts_with_probability_one_and_is_absent_with_zero():
    plain = {"size": 40, "scale": (1.0, 1.0)}
    torch.manual_seed(0)
    gray = RandomView(**plain, grayscale=1.0)(IMAGE)
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[0], gray[2])
    smooth = RandomView(**plain, blur=1.0, sigma=(2.0, 2.0))(IMAGE).double()
    assert smooth.std() < 0.3 * IMAGE.double().std()
    flipped = [RandomView(**plain, flip=p) for p in (0.0, 1.0)]
    with seeded(1):
        straight = flipped[0](IMAGE)
    with seeded(1):
        assert torch.equal(flipped[1](IMAGE), straight.flip(-1))
    assert RandomView(**plain, solarize=1.0)(IMAGE).max() < 160  # bright pixels are inverted (bicubic blurs first)


def test_jitter_stays_within_its_bounds():
    flat = torch.full((1, 8, 8), 100, dtype=torch.uint8)  # contrast leaves a flat image alone
    torch.manual_seed(0)
    values = torch.stack([jitter(flat, lambda: torch.rand(()).item()).flatten()[0] for _ in range(300)])
    assert 60 <= values.min() < 64
    assert 136 < values.max() <= 140


def test_jitter_applies_its_four_operations_in_the_drawn_order():
    numbers = iter([1.0, 0.0, 0.75, 0.9, 0.4, 0.3, 0.2, 0.1])  # four amounts, then the order: last to first
    expected = F.adjust_hue(IMAGE, 0.1 * 0.8)
    expected = F.adjust_saturation(expected, 1.1)
    expected = F.adjust_contrast(expected, 0.6)
    assert torch.equal(jitter(IMAGE, numbers.__next__), F.adjust_brightness(expected, 1.4))


def test_plain_view_resizes_the_shorter_side_and_crops_the_centre():
    image = torch.arange(60, dtype=torch.uint8).repeat(3, 30, 1)
    assert torch.equal(plain_view(30)(image), image[:, :, 15:45])
    assert plain_view(28, crop_ratio=0.875)(image).shape == (3, 28, 28)
    whole = SingleView(crop=False, flip=0).build(30)[0]
    assert torch.equal(whole(image), image[:, :, 15:45])


@pytest.mark.parametrize(
    ("size", "local"), [(224, 96), (160, 64), (96, 48), (64, 32), (32, 16), (28, 14), (3, 1), (2, 1), (1, 1)]
)
def test_local_crops_are_smaller_than_the_image_by_themselves(size, local):
    image = torch.zeros(1, size, size, dtype=torch.uint8)
    views = [view(image) for view in MultiCrop(local_crops=1).build(size)]
    assert [view.shape[-1] for view in views] == [size, size, local]


def test_local_crops_larger_than_the_image_are_refused():
    with pytest.raises(UserError, match=r"local_size is 96 but data\.image_size 28"):
        Images("mnist5k", transform=MultiCrop(local_size=96)).setup()
    assert len(MultiCrop(local_crops=0, local_size=96).build(28)) == 2  # of none the size is no matter
    assert len(MultiCrop(local_crops=1, local_size=28).build(28)) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SingleView(scale=(0.5, 0.2)), "scale is"),
        (lambda: SingleView(flip=1.5), "flip is 1.5"),
        (lambda: MultiCrop(global_scale=(0, 1)), "global_scale"),
        (lambda: MultiCrop(blur=(1, 2, 0)), "blur of global 2 is 2"),
        (lambda: MultiCrop(local_crops=-1), "local_crops is -1"),
        (lambda: MultiCrop(local_size=0), "local_size 0"),
        (lambda: MultiCrop(blur_sigma=(0, 1)), "blur_sigma"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
