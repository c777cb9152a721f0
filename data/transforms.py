"""Views of an image: the one random crop of MAE, the multi-crop of DINO, and the plain view of evaluation.

The recipes are those of He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377, appendix A.1),
and of Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv 2104.14294). Pixels are
changed by torchvision's v2 functions on uint8 tensors; `RandomView` only draws their arguments, all of a view's random
numbers at once, because for small images torchvision's transform classes take longer than the work (measured: half the
images a second). Numbers come from torch's global generator, which `seeded` sets for one sample and then puts back.
Conversion to normalised floats happens once per batch, elsewhere.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from moa_lightning.errors import UserError

Transform = Callable[[Tensor], Tensor]
BICUBIC = v2.InterpolationMode.BICUBIC
RATIO = (3 / 4, 4 / 3)
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1  # half-widths of DINO's jitter
ATTEMPTS = 10  # at a crop that fits, as in torchvision


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator seeded, and put its state back afterwards."""
    generator = torch.random.default_generator  # torch.manual_seed also visits the accelerators: 30 times slower
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class View(ABC):
    """What a training sample shows of its image. Subclasses hold options and may use any v2 transform.

    Only torch's generator is seeded for a sample: a transform that draws from `random` or numpy is not reproducible.
    """

    @abstractmethod
    def build(self, size: int) -> list[Transform]:
        """One transform for each view, in order: uint8 (C, H, W) -> uint8 (C, s, s).

        Args:
            size: side of a full view, pixels.
        """


@dataclass
class RandomView:
    """A random resized crop, then a flip, jitter, loss of colour, blur and solarisation with the given probabilities.

    Args:
        size: side of the view, pixels.
        scale: least and largest share of the image's area that is cropped.
        flip, jitter, grayscale, blur, solarize: probabilities; an image with one channel has no saturation, hue or
            colour to lose.
        sigma: least and largest standard deviation of the blur, pixels.
    """

    size: int
    scale: tuple[float, float]
    flip: float = 0.0
    jitter: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 (C, H, W) -> uint8 (C, size, size)."""
        numbers = iter(torch.rand(2 * ATTEMPTS + 16).tolist())
        draw = numbers.__next__
        box = crop_box(image.shape[-2], image.shape[-1], self.scale, draw)
        view = F.resized_crop(image, *box, [self.size, self.size], BICUBIC, antialias=True)
        if draw() < self.flip:
            view = F.horizontal_flip(view)
        if draw() < self.jitter:
            view = jitter(view, draw)
        if draw() < self.grayscale and view.shape[0] == 3:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        if draw() < self.blur:
            sigma = _between(self.sigma, draw())
            radius = min(math.ceil(3 * sigma), self.size - 1)
            view = F.gaussian_blur(view, [2 * radius + 1] * 2, [sigma, sigma])
        if draw() < self.solarize:
            view = F.solarize(view, threshold=128)
        return view


def crop_box(
    height: int, width: int, scale: tuple[float, float], draw: Callable[[], float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop with sides in a ratio between 3/4 and 4/3.

    The area is uniform in `scale` and the ratio log-uniform; a crop that does not fit is drawn again, ten times at
    most, and then the largest centred box with an allowed ratio is taken: the distribution of torchvision's
    RandomResizedCrop. `draw` returns numbers in [0, 1).
    """
    for _ in range(ATTEMPTS):
        area = height * width * _between(scale, draw())
        ratio = math.exp(_between((math.log(RATIO[0]), math.log(RATIO[1])), draw()))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw() * (height - h + 1)), int(draw() * (width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def jitter(view: Tensor, draw: Callable[[], float]) -> Tensor:
    """Change brightness, contrast and, of three channels, saturation and hue of a uint8 (C, H, W), in random order."""
    steps: list[Callable[[Tensor, float], Tensor]] = [F.adjust_brightness, F.adjust_contrast]
    amounts = [1 + BRIGHTNESS * (2 * draw() - 1), 1 + CONTRAST * (2 * draw() - 1)]
    if view.shape[0] == 3:
        steps += [F.adjust_saturation, F.adjust_hue]
        amounts += [1 + SATURATION * (2 * draw() - 1), HUE * (2 * draw() - 1)]
    order = [draw() for _ in steps]
    for _, step, amount in sorted(zip(order, steps, amounts, strict=True), key=lambda item: item[0]):
        view = step(view, amount)
    return view


class SingleView(View):
    """One view: random resized crop and horizontal flip, as in MAE.

    Args:
        scale: least and largest share of the image's area that is cropped.
        flip: probability of a horizontal flip; 0 for digits and text.
        crop: False shows the whole image, as evaluation does.
    """

    def __init__(self, scale: tuple[float, float] = (0.2, 1.0), flip: float = 0.5, crop: bool = True) -> None:
        check_scale("scale", scale)
        check_probabilities(flip=flip)
        self.scale, self.flip, self.crop = scale, flip, crop

    def build(self, size: int) -> list[Transform]:
        if self.crop:
            return [RandomView(size, self.scale, self.flip)]
        return [v2.Compose([plain_view(size), v2.RandomHorizontalFlip(self.flip)])]


class MultiCrop(View):
    """Two global and several local crops, as in DINO; colour operations fall away for images with one channel.

    Args:
        local_crops: number of local crops.
        local_size: side of a local crop, pixels: a multiple of the patch size; None: about 3/7 of a full view's, see
            `local_side`.
        global_scale: least and largest share of the image's area in a global crop.
        local_scale: the same for a local crop.
        flip: probability of a horizontal flip; 0 for digits and text.
        jitter: probability of jitter in brightness, contrast, saturation and hue (0.4, 0.4, 0.2, 0.1).
        grayscale: probability of dropping the colour.
        blur: probability of a Gaussian blur in the first global, second global and local crops.
        blur_sigma: least and largest standard deviation of the blur, pixels; scale it down for small images.
        solarize: probability of solarisation of the second global crop.
    """

    def __init__(
        self,
        local_crops: int = 8,
        local_size: int | None = None,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        flip: float = 0.5,
        jitter: float = 0.8,
        grayscale: float = 0.2,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize: float = 0.2,
    ) -> None:
        check_scale("global_scale", global_scale)
        check_scale("local_scale", local_scale)
        names = dict(zip(("blur of global 1", "blur of global 2", "blur of locals"), blur, strict=True))
        check_probabilities(flip=flip, jitter=jitter, grayscale=grayscale, solarize=solarize, **names)
        if local_crops < 0 or (local_size is not None and local_size < 1):
            raise UserError(f"local_crops is {local_crops} and local_size {local_size}: they must be at least 0 and 1")
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise UserError(f"blur_sigma is {blur_sigma} but must be two numbers above 0, the smaller first")
        self.local_crops, self.local_size = local_crops, local_size
        self.global_scale, self.local_scale = global_scale, local_scale
        self.flip, self.jitter, self.grayscale, self.solarize = flip, jitter, grayscale, solarize
        self.blur, self.blur_sigma = blur, blur_sigma

    def build(self, size: int) -> list[Transform]:
        side = local_side(size) if self.local_size is None else self.local_size
        if self.local_crops and side > size:
            raise UserError(
                f"data.transform.local_size is {side} but data.image_size {size}: a local crop must not be larger than "
                "a global one; give a smaller local_size, or null for one that suits the images"
            )
        first = self._view(size, self.global_scale, self.blur[0])
        second = self._view(size, self.global_scale, self.blur[1], self.solarize)
        local = self._view(side, self.local_scale, self.blur[2])
        return [first, second, *[local] * self.local_crops]

    def _view(self, size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> RandomView:
        return RandomView(size, scale, self.flip, self.jitter, self.grayscale, blur, self.blur_sigma, solarize)


def local_side(size: int) -> int:
    """Side of a local crop of images of `size` pixels: the multiple of 16, or of a quarter of small images, that is
    nearest to 3/7, as DINO has 96 of 224."""
    patch = max(1, min(16, size // 4))
    return patch * max(1, round(3 * size / (7 * patch)))


def plain_view(size: int, crop_ratio: float = 1.0) -> Transform:
    """The view of evaluation: the shorter side resized to `size / crop_ratio` pixels, then the centre cropped."""
    return v2.Compose([v2.Resize(round(size / crop_ratio), BICUBIC), v2.CenterCrop(size)])


def _between(bounds: tuple[float, float], share: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * share


def check_scale(name: str, scale: tuple[float, float]) -> None:
    """UserError for what is no pair of shares."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise UserError(f"{name} is {scale} but must be two shares of the image's area in (0, 1], the smaller first")


def check_probabilities(**probabilities: float) -> None:
    """UserError for the first that is no probability."""
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value} but must be a probability between 0 and 1")
