"""Corrupted images for evaluation: fifteen corruptions in four groups at five strengths, and shifts.

The source is Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations"
(arXiv 1903.12261).

Strengths are those of the authors' set for 32 x 32 pixels (CIFAR-10-C); what is measured in pixels grows with the side
of the image. Pixels go through plain tensor code in place of ImageMagick, OpenCV and photographs, so figures compare
with each other and not with published tables. Close to the original but for random numbers and rounding: the noises,
brightness, contrast, pixelate, jpeg_compression, zoom_blur, defocus_blur. Approximations: glass_blur (each pixel takes
the value of a random neighbour, where the authors swap), motion_blur (a line with a Gaussian fall-off),
elastic_transform (other borders), fog (octaves of smooth noise for a plasma fractal), snow (the motion blur above),
frost (ridges of that noise for photographs of ice). The group `shift` is ours: translation, rotation and shrinking,
borders repeated.

Random numbers come from torch's generator, which is seeded for each sample: a held-out image is corrupted alike in
every run and epoch, and at every strength from the same numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from data.transforms import Transform
from moa_lightning.errors import UserError

SEVERITIES, MIDDLE = 5, 3
SIDE = 32  # pixels for which lengths are given
OCTAVES = 6

Corruption = Callable[[Tensor, int], Tensor]  # (C, H, W) in [0, 1], strength 0 to 4 -> the same, to be clamped


@dataclass
class Corrupted:
    """A view, then a corruption: uint8 (C, H, W) -> uint8 (C, s, s).

    Args:
        view: makes the image that is corrupted.
        names: of corruptions; of several each sample draws one.
        severity: 1 to 5.
    """

    view: Transform
    names: tuple[str, ...]
    severity: int

    def __call__(self, image: Tensor) -> Tensor:
        name = self.names[int(torch.randint(len(self.names), ()))]
        pixels = CORRUPTIONS[name](self.view(image).float() / 255, self.severity - 1)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def corruption_names(name: str | None, severity: int) -> tuple[str, ...]:
    """The corruptions that a name, a group or "all" means; with None there are none.

    Raises:
        UserError: there is none of that name, or no such severity, or one without a corruption.
    """
    if severity not in range(1, SEVERITIES + 1):
        raise UserError(f"severity is {severity}: give a strength from 1 to {SEVERITIES}")
    if name is None:
        if severity != MIDDLE:
            raise UserError(
                f"severity is {severity} and there is no corruption: give data.corruption too, or leave data.severity "
                f"at {MIDDLE}"
            )
        return ()
    if name in CORRUPTIONS:
        return (name,)
    groups = {**GROUPS, "all": tuple(each for group, names in GROUPS.items() if group != "shift" for each in names)}
    if name not in groups:
        raise UserError(f"corruption '{name}' is unknown; choose from {', '.join([*CORRUPTIONS, *groups])}")
    return groups[name]


def gaussian_noise(x: Tensor, level: int) -> Tensor:
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[level] * torch.randn(x.shape)


def shot_noise(x: Tensor, level: int) -> Tensor:
    """Photons counted."""
    photons = (500, 250, 100, 75, 50)[level]
    return torch.poisson(x * photons) / photons


def impulse_noise(x: Tensor, level: int) -> Tensor:
    """Values that become 0 or 1."""
    draw = torch.rand(x.shape) / (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    return torch.where(draw < 1, (draw < 0.5).float(), x)


def defocus_blur(x: Tensor, level: int) -> Tensor:
    """A disk, softened."""
    radius, soft = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[level]
    radius, soft = radius * _unit(x), soft * _unit(x)
    offsets = _offsets(math.ceil(radius + 0.5))
    distance = (offsets[:, None] ** 2 + offsets**2).sqrt()
    disk = (radius + 0.5 - distance).clamp(0, 1)  # the share of a pixel inside
    return _gaussian(_convolved(x, disk / disk.sum()), soft)


def glass_blur(x: Tensor, level: int) -> Tensor:
    sigma, reach, times = ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))[level]
    sigma, reach = sigma * _unit(x), max(1, round(reach * _unit(x)))
    x = _gaussian(x, sigma)
    height, width = x.shape[-2:]
    for _ in range(times):
        moves = torch.randint(-reach, reach + 1, (2, height, width))
        rows = (torch.arange(height)[:, None] + moves[0]).clamp(0, height - 1)
        columns = (torch.arange(width) + moves[1]).clamp(0, width - 1)
        x = x[:, rows, columns]
    return _gaussian(x, sigma)


def motion_blur(x: Tensor, level: int) -> Tensor:
    radius, sigma = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[level]
    return _moved(x, radius, sigma, _between(-45, 45))


def zoom_blur(x: Tensor, level: int) -> Tensor:
    factors = [1 + step / 100 for step in range((6, 11, 16, 21, 26)[level])]
    return torch.stack([x, *(_warped(x, torch.eye(2) / factor) for factor in factors)]).mean(0)


def snow(x: Tensor, level: int) -> Tensor:
    mean, spread, zoom, least, radius, sigma, keep = (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    )[level]
    flakes = _warped(mean + spread * torch.randn(1, *x.shape[-2:]), torch.eye(2) / zoom)
    flakes = _moved(torch.where(flakes < least, 0.0, flakes).clamp(0, 1), radius, sigma, _between(-135, -45))
    pale = torch.maximum(x, 1.5 * x.mean(0, keepdim=True) + 0.5)
    return keep * x + (1 - keep) * pale + flakes + flakes.rot90(2, (1, 2))


def frost(x: Tensor, level: int) -> Tensor:
    keep, amount = ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))[level]
    ridges = 1 - (2 * _clouds(x, 1.7) - 1).abs()
    return keep * x + amount * ridges**2


def fog(x: Tensor, level: int) -> Tensor:
    amount, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[level]
    brightest = x.max()
    return (x + amount * _clouds(x, decay)) * brightest / (brightest + amount)


def brightness(x: Tensor, level: int) -> Tensor:
    """More of the value in the sense of HSV: the largest channel, the others in proportion."""
    value = x.amax(0, keepdim=True)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[level]).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp_min(1e-6), brighter)


def contrast(x: Tensor, level: int) -> Tensor:
    mean = x.mean((1, 2), keepdim=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean


def elastic_transform(x: Tensor, level: int) -> Tensor:
    """A random affine map of three points, then smooth displacements."""
    size, smooth, move = (
        (0.0, 0.0, 0.08),
        (0.05, 0.2, 0.07),
        (0.08, 0.06, 0.06),
        (0.1, 0.04, 0.05),
        (0.1, 0.03, 0.03),
    )[level]
    points = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]) * 2 / 3
    moved = points + 2 * move * (2 * torch.rand(3, 2) - 1)
    affine = torch.linalg.solve(torch.cat([moved, torch.ones(3, 1)], 1), points).T  # where a point came from
    noise = 2 * torch.rand(2, *x.shape[-2:]) - 1
    field = 2 * size * _gaussian(noise, smooth * x.shape[-1]) if size else 0 * noise
    return _warped(x, affine[:, :2], affine[:, 2], field.permute(1, 2, 0))


def pixelate(x: Tensor, level: int) -> Tensor:
    share = (0.95, 0.9, 0.85, 0.75, 0.65)[level]
    small = F.interpolate(x[None], [max(1, int(side * share)) for side in x.shape[-2:]], mode="area")
    return F.interpolate(small, list(x.shape[-2:]), mode="nearest-exact")[0]


def jpeg_compression(x: Tensor, level: int) -> Tensor:
    pixels = (x * 255).round().to(torch.uint8)
    return decode_jpeg(encode_jpeg(pixels, (80, 65, 58, 50, 40)[level])).float() / 255


def translation(x: Tensor, level: int) -> Tensor:
    """By 4, 8, 12, 16 or 20 percent of the side, in any direction."""
    angle = math.radians(_between(0, 360))
    return _warped(x, torch.eye(2), 0.08 * (level + 1) * torch.tensor([math.cos(angle), math.sin(angle)]))


def rotation(x: Tensor, level: int) -> Tensor:
    """By 10, 20, 30, 40 or 50 degrees, to either side."""
    angle = math.radians(10 * (level + 1)) * (1 if _between(0, 1) < 0.5 else -1)
    return _warped(x, torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]))


def shrinking(x: Tensor, level: int) -> Tensor:
    """To 90, 80, 70, 60 or 50 percent of the size."""
    return _warped(x, torch.eye(2) / (0.9 - 0.1 * level))


def _unit(x: Tensor) -> float:
    return x.shape[-1] / SIDE


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _offsets(radius: int) -> Tensor:
    return torch.arange(-radius, radius + 1, dtype=torch.float32)


def _convolved(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of (C, H, W) with a kernel of odd sides, borders repeated."""
    rows, columns = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = F.pad(x[:, None], [columns, columns, rows, rows], mode="replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """Blurred with a standard deviation in pixels, cut off at four of them."""
    weights = torch.exp(-0.5 * (_offsets(max(1, math.ceil(4 * sigma))) / sigma) ** 2)
    weights = weights / weights.sum()
    return _convolved(_convolved(x, weights[None]), weights[:, None])


def _moved(x: Tensor, radius: float, sigma: float, degrees: float) -> Tensor:
    """Blurred along a line that begins at each pixel, lengths at SIDE pixels."""
    steps = torch.arange(0, radius * _unit(x) + 0.5, max(1.0, _unit(x) / 4))
    weights = torch.exp(-0.5 * (steps / (sigma * _unit(x))) ** 2)
    angle = math.radians(degrees)
    way = torch.tensor([math.cos(angle), math.sin(angle)]) * 2 / x.shape[-1]
    total = torch.zeros_like(x)
    for step, weight in zip(steps.tolist(), (weights / weights.sum()).tolist(), strict=True):
        total += weight * _warped(x, torch.eye(2), step * way)
    return total


def _clouds(x: Tensor, decay: float) -> Tensor:
    """Smooth noise (1, H, W) from 0 to 1: each octave is twice as fine as the one before and `decay` times as weak."""
    size = list(x.shape[-2:])
    noise = torch.zeros(1, 1, *size)
    for octave in range(OCTAVES):
        grid = torch.rand(1, 1, 2**octave + 1, 2**octave + 1) - 0.5
        noise += F.interpolate(grid, size, mode="bilinear", align_corners=True) / decay**octave
    return ((noise - noise.min()) / (noise.max() - noise.min()))[0]


def _warped(x: Tensor, matrix: Tensor, shift: Tensor | None = None, field: Tensor | float = 0.0) -> Tensor:
    """The image where each place (column, row), in [-1, 1], shows what lay at matrix · place + shift + field."""
    shift = torch.zeros(2) if shift is None else shift
    grid = F.affine_grid(torch.cat([matrix, shift[:, None]], 1)[None], [1, *x.shape], align_corners=False) + field
    return F.grid_sample(x[None], grid, mode="bilinear", padding_mode="border", align_corners=False)[0]


GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "shift": ("translation", "rotation", "shrinking"),
}
CORRUPTIONS: dict[str, Corruption] = {name: globals()[name] for names in GROUPS.values() for name in names}
