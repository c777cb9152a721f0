"""The masked autoencoder on every family that can leave patches out: what the encoder sees, gradients, costs."""

import io
import math

import pytest
import torch

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.losses import masked_pixel_loss
from moa_lightning.models import MaskedAutoencoder
from moa_lightning.models.mae import random_mask
from tests.models.families import FAMILIES, IMAGE, NOT_PLAIN, PATCHES, SMALL, images
from tests.models.nets import FFNS, PLACES, assert_same_where_shapes_agree, counted_flops, fragment, shake, start
from tests.official import EXACT, needs_official, official

every_family = pytest.mark.parametrize("name", FAMILIES)


def mae(name: str = FAMILIES[0], ffn: str = "gelu", channels: int = 1, seed: int = 0, **options) -> MaskedAutoencoder:
    sizes = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2, **options}
    return MaskedAutoencoder(name, SMALL, fragment(ffn), fragment(ffn), IMAGE, channels, seed=seed, **sizes)


def noise(batch: int = 2, patches: int = PATCHES) -> torch.Tensor:
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(5))


@needs_official
def test_masks_from_noise_are_the_official_ones() -> None:
    kept, mask, restore = random_mask(official("mae_noise"), 0.75)
    assert torch.equal(mask, official("mae_mask_from_noise"))
    assert torch.equal(restore, official("mae_ids_restore"))
    assert torch.equal(official("mae_x").gather(1, kept[:, :, None].expand(-1, -1, 6)), official("mae_x_kept"))


def wave(shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers that any program can fill a tensor with."""
    count = math.prod(shape)
    return (0.2 * torch.cos(0.37 * torch.arange(count, dtype=torch.float64) ** 1.1 + count)).view(shape)


OFFICIAL_GRADIENTS = {
    "encoder.cls_token": 4.176528523905253e-06,
    "encoder.patch_embed.proj.weight": 8.59715765440927e-06,
    "encoder.blocks.0.attn.qkv.weight": 3.819330914850559e-05,
    "encoder.blocks.1.mlp.up_proj.weight": 3.615935237842628e-05,
    "encoder.norm.weight": 0.0001405007147608573,
    "decoder.mask_token": 0.009728534230739033,
    "decoder.embed.weight": 0.0003804174836601106,
    "decoder.blocks.1.mlp.down_proj.bias": 0.010603807944960162,
    "decoder.norm.weight": 0.10664770511357517,
    "decoder.pred.weight": 0.053197774691119366,
}
"""norms, of facebookresearch/mae's MaskedAutoencoderViT (commit efb2a80, timm 1.0.31) in float64"""


@pytest.mark.parametrize("visible", [True, False])
def test_the_whole_net_is_the_official_one(visible: bool) -> None:
    """Same sizes, every parameter but the positions filled with `wave`, the same images and noise."""
    net = mae(channels=3).double()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = wave(parameter.shape)
    given = ((torch.arange(32) * 7919) % 9973 / 9973).view(2, 16)
    pixels = wave((2, 3, IMAGE, IMAGE))
    predicted, mask = net(pixels, given, visible)
    loss = masked_pixel_loss(predicted, net.patchify(pixels), mask)
    loss.backward()
    assert loss.item() == pytest.approx(1.0142616744660886, rel=EXACT)
    every = predicted if visible else net(pixels, given)[0]
    assert every.norm().item() == pytest.approx(7.787496159752473, rel=EXACT)
    assert visible or torch.equal(predicted == 0, (mask == 0)[:, :, None].expand_as(predicted))
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert torch.nn.utils.get_total_norm(gradients.values()).item() == pytest.approx(0.16611855363414135, rel=EXACT)
    for name, norm in OFFICIAL_GRADIENTS.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-8), name


@pytest.mark.parametrize(("ratio", "keep"), [(0.75, 4), (0.5, 8), (0.9, 1), (0.74, 4)])
def test_the_share_of_removed_patches(ratio: float, keep: int) -> None:
    kept, mask, _ = random_mask(noise(3), ratio)
    assert kept.shape == (3, keep)
    assert mask.sum(1).tolist() == [PATCHES - keep] * 3
    assert (mask.gather(1, kept) == 0).all()


@every_family
def test_loss_is_finite_and_gradient_reaches_every_parameter(name: str) -> None:
    """No unused parameters: plain data-parallel training would stop on them."""
    net = shake(mae(name), scale=0.1)
    predicted, mask = net(images(channels=1), noise())
    assert predicted.shape == (2, PATCHES, 16)
    loss = masked_pixel_loss(predicted, net.patchify(images(channels=1)), mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert not [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize("ffn", [*FFNS, *PLACES])
def test_gradient_reaches_every_parameter_of_every_ffn(ffn: str) -> None:
    """And is the same where what the loss ignores is left out; but for shuffled gates, which come from there."""
    net = shake(mae(ffn=ffn), scale=0.1).double()
    gradients = []
    for visible in (True, False):
        net.zero_grad()
        predicted, mask = net(images(channels=1).double(), noise(), visible)
        masked_pixel_loss(predicted, net.patchify(images(channels=1).double()), mask).backward()
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.requires_grad})
        assert not [n for n, gradient in gradients[-1].items() if gradient is None or not gradient.any()]
    if ffn != "moa_shuffled_gates":
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("encoder", "decoder"), [("moa_gated_both", "gelu"), ("gelu", "la"), ("la", "swiglu")])
def test_encoder_and_decoder_have_layers_of_their_own(encoder: str, decoder: str) -> None:
    sizes = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    net = shake(
        MaskedAutoencoder(FAMILIES[0], SMALL, fragment(encoder), fragment(decoder), IMAGE, 1, **sizes), scale=0.1
    )
    assert {block.mlp.config for block in net.encoder.blocks} == {fragment(encoder)}
    assert {block.mlp.config for block in net.decoder.blocks} == {fragment(decoder)}
    predicted, mask = net(images(channels=1), noise())
    masked_pixel_loss(predicted, net.patchify(images(channels=1)), mask).backward()
    assert not [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


@pytest.mark.parametrize(("size", "patch", "channels"), [(16, 8, 1), (24, 4, 3), (20, 2, 1)])
def test_other_sizes_patches_and_channels(size: int, patch: int, channels: int) -> None:
    sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5}
    layer = fragment("gelu")
    net = MaskedAutoencoder(FAMILIES[0], {**SMALL, "patch_size": patch}, layer, layer, size, channels, **sizes)
    count = (size // patch) ** 2
    pixels = images(2, channels, size)
    predicted, mask = net(pixels, noise(2, count))
    assert predicted.shape == net.patchify(pixels).shape == (2, count, patch**2 * channels)
    assert mask.sum(1).tolist() == [count - int(count * 0.5)] * 2
    assert net.features(pixels).shape == (2, 48)


@every_family
def test_the_encoder_sees_the_kept_patches_and_only_those(name: str) -> None:
    net = shake(mae(name)).eval()
    kept, mask, _ = random_mask(noise(), 0.75)
    pixels = images(channels=1).requires_grad_()
    net.encode(pixels, kept).square().sum().backward()
    touched = net.patchify(pixels.grad).abs().amax(-1) > 0
    assert torch.equal(touched, mask == 0)


@every_family
def test_all_patches_in_any_order_give_timms_own_features(name: str) -> None:
    """Tokens carry their position with them, whatever kind of position the family has."""
    net = shake(mae(name, channels=3)).eval()
    order = noise().argsort(1)
    prefix = net.encoder.num_prefix_tokens
    with torch.no_grad():
        whole, shuffled = net.encode(images()), net.encode(images(), order)
        selector = net.encoder.patch_drop
        net.encoder.patch_drop = None if selector.return_indices else torch.nn.Identity()
        expected = net.encoder.forward_features(images())
    assert torch.equal(whole, expected)
    assert torch.allclose(shuffled[:, :prefix], expected[:, :prefix], atol=1e-5)
    moved = expected[:, prefix:].gather(1, order[:, :, None].expand(-1, -1, 48))
    assert torch.allclose(shuffled[:, prefix:], moved, atol=1e-5)
    assert not torch.allclose(shuffled[:, prefix:], expected[:, prefix:], atol=1e-1)


@every_family
def test_features_are_the_mean_of_the_output_patches(name: str) -> None:
    net = mae(name, channels=3).eval()
    with torch.no_grad():
        tokens = net.encoder.forward_features(images())
        assert torch.allclose(net.features(images()), tokens[:, -PATCHES:].mean(1), atol=1e-6)


def test_positions_are_fixed_and_sinusoidal_with_none_for_the_class_token() -> None:
    net = mae()
    positions = net.encoder.pos_embed
    assert not positions.requires_grad
    assert not positions[:, 0].any()
    assert torch.equal(positions[0, 1, 24:], positions[0, 4, 24:])  # one row
    assert torch.equal(positions[0, 1, :24], positions[0, 5, :24])  # one column


def test_the_decoder_puts_every_code_in_its_place() -> None:
    """The decoder's blocks get the code of a visible patch at its own position, and one token at the masked ones."""
    net = shake(mae())
    seen: list[torch.Tensor] = []
    net.decoder.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    _, mask = net(images(channels=1), noise())
    entered = seen[0][:, 1:] - net.decoder.positions
    token = net.decoder.mask_token[0, 0]
    assert torch.allclose(entered[mask == 1], token, atol=1e-6)
    assert not torch.isclose(entered[mask == 0], token, atol=1e-3).all(-1).any()
    kept, _, _ = random_mask(noise(), 0.75)
    codes = net.decoder.embed(net.encode(images(channels=1), kept)[:, 1:])
    for sample in range(2):
        assert torch.allclose(entered[sample, kept[sample]], codes[sample], atol=1e-5)


@every_family
def test_starts_depend_on_seed_and_name_alone(name: str) -> None:
    torch.manual_seed(1)
    first = start(mae(name, "moa_paper"))
    torch.manual_seed(2)
    second, other = start(mae(name, "moa_paper")), start(mae(name, "moa_paper", seed=1))
    assert all(torch.equal(first[n], second[n]) for n in first)
    drawn = ("encoder.patch_embed.proj.weight", "decoder.mask_token", "decoder.blocks.1.mlp.up_mix.gate_weight")
    assert all(not torch.equal(first[n], other[n]) for n in drawn)
    assert not torch.equal(first["decoder.blocks.0.attn.qkv.weight"], first["decoder.blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("ffn", FFNS)
def test_variants_start_from_the_same_numbers(ffn: str) -> None:
    trunk = {"encoder.blocks.1.attn.qkv.weight", "decoder.pred.weight", "encoder.cls_token"}
    assert_same_where_shapes_agree(mae(), mae(ffn=ffn), trunk)


@every_family
def test_flops_are_those_that_torch_counts(name: str) -> None:
    net = mae(name)
    assert net.flops_per_image() == counted_flops(lambda: net(images(1, 1), noise(1), visible=False))


@pytest.mark.parametrize("ffn", [*FFNS, *PLACES])
def test_flops_of_every_ffn_are_those_that_torch_counts(ffn: str) -> None:
    net = mae(ffn=ffn, mask_ratio=0.5)
    assert net.flops_per_image() == counted_flops(lambda: net(images(1, 1), noise(1), visible=False))


@every_family
def test_a_saved_state_gives_the_same_outputs(name: str) -> None:
    first, second, file = shake(mae(name)).eval(), mae(name, seed=1).eval(), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(first(images(channels=1), noise())[0], second(images(channels=1), noise())[0])


@pytest.mark.parametrize(("name", "size"), NOT_PLAIN.items())
def test_nets_that_cannot_leave_patches_out_are_refused_by_name(name: str, size: int) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=name):
        MaskedAutoencoder(name, {}, FFNConfig(), FFNConfig(), size, 3, decoder_depth=1)


def test_images_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(UserError, match=r"18 pixels .* patches of 4"):
        MaskedAutoencoder(FAMILIES[0], SMALL, FFNConfig(), FFNConfig(), 18, 3, decoder_depth=1)


def test_pooling_is_the_decoders_business() -> None:
    pooled = MaskedAutoencoder(
        FAMILIES[0], {**SMALL, "global_pool": "avg"}, FFNConfig(), FFNConfig(), IMAGE, 1, decoder_depth=1
    )
    assert pooled(images(channels=1), noise())[0].shape == (2, PATCHES, 16)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
        ({"mask_ratio": 0.0}, "mask_ratio 0.0"),
        ({"mask_ratio": float("nan")}, "mask_ratio nan"),
        ({"decoder_dim": 18, "decoder_heads": 4}, "decoder_dim 18"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "multiple of 4, not 18"),
    ],
)
def test_impossible_options_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        mae(**options)
