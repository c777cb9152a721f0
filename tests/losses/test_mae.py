"""The masked autoencoder's patches and loss, against the official implementation's numbers and by definition."""

import pytest
import torch

from moa_lightning.losses import masked_pixel_loss, patchify, unpatchify
from tests.official import EXACT, SINGLE, close, needs_official, official


@needs_official
def test_patches_are_the_official_ones() -> None:
    assert torch.equal(patchify(official("mae_imgs"), 4), official("mae_patches"))


@needs_official
@pytest.mark.parametrize(("normalize", "name"), [(False, "raw"), (True, "norm")])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, SINGLE)])
def test_loss_and_gradient_are_the_official_ones(normalize, name, dtype, tolerance) -> None:
    predicted = official("mae_pred").to(dtype).requires_grad_()
    target, mask = patchify(official("mae_imgs").to(dtype), 4), official("mae_mask").to(dtype)
    loss = masked_pixel_loss(predicted, target, mask, normalize)
    loss.backward()
    assert close(loss.detach(), official(f"mae_loss_{name}"), tolerance)
    assert close(predicted.grad, official(f"mae_grad_{name}"), tolerance)


def test_a_patch_holds_its_own_pixels_row_by_row_channels_last() -> None:
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # row 1, column 2 of the grid of 2 x 3 patches
    assert torch.equal(patches[1, 5].view(2, 2, 3), images[1, :, 2:4, 4:6].permute(1, 2, 0))


@pytest.mark.parametrize("channels", [1, 3])
def test_unpatchify_undoes_patchify(channels: int) -> None:
    images = torch.rand(2, channels, 8, 12)
    assert torch.equal(unpatchify(patchify(images, 4), 4, rows=2, columns=3), images)


def test_only_removed_patches_count() -> None:
    predicted, target = torch.rand(2, 4, 12), torch.rand(2, 4, 12)
    mask = torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1]])
    changed = predicted + 100 * (1 - mask[:, :, None])
    assert masked_pixel_loss(predicted, target, mask) == masked_pixel_loss(changed, target, mask)
    assert masked_pixel_loss(target, target, mask, normalize=False) == 0


def test_normalised_targets_do_not_see_brightness_and_contrast() -> None:
    predicted, target, mask = torch.rand(2, 4, 48).double(), torch.rand(2, 4, 48).double(), torch.ones(2, 4).double()
    loss = masked_pixel_loss(predicted, target, mask)
    assert masked_pixel_loss(predicted, 7 * target - 3, mask).item() == pytest.approx(loss.item(), rel=1e-4)
    assert masked_pixel_loss(predicted, 7 * target - 3, mask, normalize=False) > 2 * loss


def test_an_even_patch_has_a_finite_loss() -> None:
    loss = masked_pixel_loss(torch.rand(1, 4, 12), torch.full((1, 4, 12), 0.3), torch.ones(1, 4))
    assert torch.isfinite(loss)


def test_half_precision_is_summed_in_float32() -> None:
    predicted, target, mask = torch.rand(2, 4, 48), torch.rand(2, 4, 48), torch.ones(2, 4)
    wide = masked_pixel_loss(predicted.bfloat16().float(), target.bfloat16().float(), mask)
    assert masked_pixel_loss(predicted.bfloat16(), target.bfloat16(), mask) == wide
