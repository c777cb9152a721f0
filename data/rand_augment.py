"""RandAugment (Cubuk et al., arXiv 1909.13719) as DeiT and MAE fine-tune with it: timm's operations, on a crop of the
image.

timm draws from the generators of `random` and numpy. For a sample these are seeded with a number from torch's, which
the sample's own seed has set, and put back afterwards.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from data.image_base import IMAGENET_MEAN, with_channels
from data.transforms import RandomView, Transform, View, check_probabilities, check_scale
from moa_lightning.errors import UserError

SHIFT = 0.45  # of the side: the largest translation, as in timm


@contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Run with the generators of `random` and numpy seeded, and put their states back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class RandAugment(View):
    """One view: a random resized crop, a horizontal flip, then randomly chosen changes of geometry and colour.

    Args:
        policy: timm's description: m is the magnitude (of 10), mstd its standard deviation, n the number of
            operations, each applied with probability 0.5, inc1 operations that grow with the magnitude.
        scale: least and largest share of the image's area that is cropped.
        flip: probability of a horizontal flip; 0 for digits and text.

    Raises:
        UserError: timm does not understand the policy.
    """

    def __init__(
        self, policy: str = "rand-m9-mstd0.5-inc1", scale: tuple[float, float] = (0.08, 1.0), flip: float = 0.5
    ) -> None:
        check_scale("scale", scale)
        check_probabilities(flip=flip)
        self.policy, self.scale, self.flip = policy, scale, flip
        self.build(1)

    def build(self, size: int) -> list[Transform]:
        fill = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
        options = {"translate_const": int(size * SHIFT), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
        try:
            change = rand_augment_transform(self.policy, options)
        except (AssertionError, ValueError) as error:
            raise UserError(f"policy '{self.policy}' is not one of timm's, such as rand-m9-mstd0.5-inc1") from error
        return [Augmented(RandomView(size, self.scale, self.flip), change)]


class Augmented:
    """A view and then a change of timm's: uint8 (C, H, W) -> uint8 (C, s, s).

    Grey images are changed as RGB and made grey again.

    Args:
        view: the crop.
        change: of a PIL image.
    """

    def __init__(self, view: RandomView, change: Any) -> None:
        self.view, self.change = view, change

    def __call__(self, image: Tensor) -> Tensor:
        shown = self.view(image)
        pixels = with_channels(shown, 3).permute(1, 2, 0).contiguous().numpy()
        with python_seeded(int(torch.randint(2**31, ()))):
            changed = np.array(self.change(Image.fromarray(pixels)))
        return with_channels(torch.from_numpy(changed).permute(2, 0, 1).contiguous(), len(image))
