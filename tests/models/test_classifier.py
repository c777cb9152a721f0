"""A classifier on a timm vision transformer: MAE's pooling and head, and the layers that its rates count."""

import pytest
import torch
from torch import nn

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import ImageClassifier
from tests.models.families import FAMILIES, IMAGE, SMALL, images
from tests.models.nets import counted_flops, shake

TINY = FAMILIES[0]


def classifier(name: str = TINY, ffn: FFNConfig = FFNConfig("moa"), **options) -> ImageClassifier:  # noqa: B008
    return ImageClassifier(name, SMALL, ffn, IMAGE, 3, 7, **options)


def test_the_average_of_the_patches_is_normalised_and_read() -> None:
    """The official fine-tuning: no norm behind the blocks, the mean of the patches, a norm, a linear layer."""
    net: nn.Module = shake(classifier()).eval()
    vit = net.vit
    with torch.no_grad():
        x = vit.patch_embed(images())
        x = torch.cat([vit.cls_token.expand(2, -1, -1), x], 1) + vit.pos_embed
        for block in vit.blocks:
            x = block(x)
        mean = x[:, 1:].mean(1)
        scaled = (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        expected = (scaled * vit.fc_norm.weight + vit.fc_norm.bias) @ vit.head.weight.T + vit.head.bias
        assert torch.allclose(net(images()), expected, atol=1e-5)
        features, logits = net.features_and_logits(images())
        assert torch.equal(logits, net(images()))
        assert torch.equal(features, net.features(images()))


def test_a_class_token_is_read_behind_the_final_norm() -> None:
    net = shake(classifier(pool="token")).eval()
    with torch.no_grad():
        assert torch.allclose(net.features(images()), net.vit.forward_features(images())[:, 0])


def test_the_head_starts_near_zero() -> None:
    head = classifier().vit.head
    assert 1e-5 < head.weight.std() < 3e-5
    assert not head.bias.any()


def test_a_distilled_net_has_two_heads_and_their_mean() -> None:
    net = classifier("deit_tiny_distilled_patch16_224", pool="token")
    assert 1e-5 < net.vit.head_dist.weight.std() < 3e-5
    net = shake(net).eval()
    with torch.no_grad():
        features, logits = net.features_and_logits(images())
        assert torch.equal(logits, net(images()))
        tokens = net.vit.forward_features(images())
        expected = (net.vit.head(tokens[:, 0]) + net.vit.head_dist(tokens[:, 1])) / 2
        assert torch.allclose(logits, expected, atol=1e-6)
        assert torch.allclose(features, tokens[:, :2].mean(1), atol=1e-6)


@pytest.mark.parametrize("name", [TINY, "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224"])
def test_rates_fall_from_the_head_to_the_patches(name: str) -> None:
    """As MAE's lr_decay counts: patches, tokens and positions 0, block i is i + 1, the head one more than the last."""
    net = classifier(name, FFNConfig("moa", "gated") if "eva02" in name else FFNConfig("moa"))
    rates = net.layer_rates(0.5)
    parameters = [parameter for parameter, _ in net.named_parameters()]
    assert set(parameters) == set(rates)
    for parameter in parameters:
        parts = parameter.split(".")
        layer = int(parts[2]) + 1 if parts[1] == "blocks" else 3 if parts[1] in ("head", "fc_norm") else 0
        assert rates[parameter] == 0.5 ** (3 - layer), parameter
    assert any("_mix." in parameter for parameter in parameters)


def test_flops_are_those_that_torch_counts() -> None:
    net = classifier(ffn=FFNConfig()).eval()
    assert net.flops_per_image() == counted_flops(lambda: net(images(1)))


def test_what_is_no_plain_vision_transformer_is_refused() -> None:
    small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 1)}
    with pytest.raises(UserError, match="plain vision transformer"):
        ImageClassifier("swin_tiny_patch4_window7_224", small, FFNConfig(), 56, 3, 7)
