"""Student and teacher on every family: batches of crops, hidden patches, the average, the head, gradients, attention,
costs."""

import io

import pytest
import torch

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.masking import IBOTConfig
from moa_lightning.models import SelfDistillation
from moa_lightning.models.attention import look
from moa_lightning.models.dino import DINOHead, group_by_size
from tests.models.families import FAMILIES, IMAGE, NOT_PLAIN, SMALL, images
from tests.models.nets import FFNS, assert_same_where_shapes_agree, counted_flops, fragment, shake, start

every_family = pytest.mark.parametrize("name", FAMILIES)


def dino(name: str = FAMILIES[0], ffn: str = "gelu", seed: int = 0, **options) -> SelfDistillation:
    sizes = {"out_dim": 10, "hidden_dim": 12, "bottleneck_dim": 6, "drop_path_rate": 0.0, **options}
    return SelfDistillation(name, SMALL, fragment(ffn), IMAGE, 3, seed=seed, **sizes)


def views(batch: int = 2) -> list[torch.Tensor]:
    """Two global crops, then three local ones."""
    return [images(batch, 3, size, seed) for seed, size in enumerate((IMAGE, IMAGE, 8, 8, 8))]


@every_family
def test_one_pass_per_size_equals_a_pass_per_crop(name: str) -> None:
    net = shake(dino(name))
    passes = []
    net.student.backbone.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    together = net.student(views())
    assert passes == [4, 6]
    separate = torch.cat([net.student([view]) for view in views()])
    assert torch.allclose(together, separate, rtol=0, atol=1e-5)
    assert not torch.allclose(together[:2], together[2:4], rtol=0, atol=2e-4)


def test_grouping_keeps_the_order_of_the_views() -> None:
    sizes = [16, 16, 8, 16, 8, 8]
    groups = group_by_size([torch.full((1, 1, size, size), float(i)) for i, size in enumerate(sizes)])
    assert [[int(v.flatten()[0]) for v in group] for group in groups] == [[0, 1], [2], [3], [4, 5]]


@every_family
def test_the_teacher_starts_as_the_student_and_gets_no_gradient(name: str) -> None:
    net = dino(name, "moa_gated_both").train()
    student, teacher = net.student.state_dict(), net.teacher.state_dict()
    assert all(torch.equal(student[n], teacher[n]) for n in student | teacher)
    assert not {p.data_ptr() for p in net.student.parameters()} & {p.data_ptr() for p in net.teacher.parameters()}
    out, target = net(views())
    assert out.shape == (10, 10)
    assert torch.allclose(out[:4].detach(), target, atol=1e-6)
    assert not target.requires_grad
    out.square().sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in net.teacher.parameters())


@every_family
def test_gradient_reaches_every_parameter_of_the_student(name: str) -> None:
    net = shake(dino(name, norm_last_layer=False), scale=0.1)
    student, teacher = net(views())
    (-(teacher / 0.1).softmax(-1).repeat(3, 1)[:10] * student.log_softmax(-1)).sum().backward()
    assert not [n for n, p in net.student.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("ffn", FFNS)
def test_gradient_reaches_every_parameter_of_every_ffn(ffn: str) -> None:
    net = shake(dino(ffn=ffn), scale=0.1)
    net(views())[0].logsumexp(-1).sum().backward()
    assert not [n for n, p in net.student.named_parameters() if p.grad is None or not p.grad.any()]


HIDDEN = [1, 6, 7, 16 + 3, 3 * 16 + 15]  # patches among the 4 x 16 of two global crops of two images


def masked(net: SelfDistillation, crops: list[torch.Tensor], hidden: list[int] = HIDDEN):
    mask = torch.zeros(64, dtype=torch.bool)
    mask[hidden] = True
    return net.masked(crops, mask.view(4, 16), torch.tensor(hidden, dtype=torch.int64))


@every_family
def test_the_student_does_not_see_hidden_patches_and_the_teacher_does(name: str) -> None:
    net, crops = shake(dino(name, ibot=IBOTConfig())), views()
    net.update_teacher(0.0)
    other = [crop.clone() for crop in crops]
    for n in HIDDEN:
        image, patch = divmod(n, 16)
        row, column = 4 * (patch // 4), 4 * (patch % 4)
        other[image // 2][image % 2, :, row : row + 4, column : column + 4] += 1
    with torch.no_grad():
        first, second = masked(net, crops), masked(net, other)
        assert torch.equal(first.student, second.student)
        assert torch.equal(first.student_patches, second.student_patches)
        touched = [0, 1, 3]  # of the four global crops
        assert (first.teacher - second.teacher).abs().amax(1)[touched].min() > 1e-4
        assert (first.teacher_patches - second.teacher_patches).abs().amax(1).min() > 1e-4
        assert torch.allclose(first.teacher, net.teacher(crops[:2]), atol=1e-6)
        # a token has the position of its patch
        assert not torch.allclose(first.student_patches[1], first.student_patches[2], rtol=0, atol=1e-4)
        net.mask_token += torch.linspace(-1, 1, 48)  # a constant would be lost in the norms
        third = masked(net, crops)
        assert (third.student - first.student).abs().amax(1)[touched].min() > 1e-4
        untouched = [2, *range(4, 10)]
        assert torch.allclose(third.student[untouched], first.student[untouched], atol=1e-6)


@every_family
def test_with_nothing_hidden_the_outputs_are_those_of_a_plain_pass(name: str) -> None:
    net = shake(dino(name, ibot=IBOTConfig()))
    with torch.no_grad():
        found, (student, teacher) = masked(net, views(), []), net(views())
    assert torch.allclose(found.student, student, atol=1e-6)
    assert torch.allclose(found.teacher, teacher, atol=1e-6)
    assert found.student_patches.shape == found.teacher_patches.shape == (0, 10)


def test_patches_pass_the_head_of_the_crops_or_their_own() -> None:
    """The teacher's, whose input is what timm's own forward pass leaves behind the last norm."""
    for own in (None, 8):
        net, crops = shake(dino(ibot=IBOTConfig(out_dim=own, hidden_dim=5, bottleneck_dim=3))), views()
        shake(net.teacher.requires_grad_(True), seed=1).requires_grad_(False)
        with torch.no_grad():
            tokens = net.teacher.backbone.forward_features(torch.cat(crops[:2]))[:, 1:].flatten(0, 1)[HIDDEN]
            head = net.teacher.head if own is None else net.teacher.patch_head
            assert torch.allclose(masked(net, crops).teacher_patches, head(tokens), atol=1e-5)
        assert head(tokens).shape == (5, own or 10)


@pytest.mark.parametrize("own", [None, 8])
def test_gradient_reaches_token_and_heads_also_where_nothing_is_hidden(own: int | None) -> None:
    """DDP wants a gradient for every parameter in every process."""
    net = shake(dino(ibot=IBOTConfig(out_dim=own, hidden_dim=5, bottleneck_dim=3), norm_last_layer=False), scale=0.1)
    trained = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    for hidden in ([], HIDDEN):
        net.zero_grad()
        found = masked(net, views(), hidden)
        (found.student.logsumexp(-1).sum() + found.student_patches.logsumexp(-1).sum()).backward()
        assert not [n for n, p in trained if p.grad is None]
        idle = {n for n, p in trained if not p.grad.any()}
        alone = {n for n, _ in trained if n == "mask_token" or "patch_head" in n}
        assert idle == (set() if hidden else alone)
    assert ("student.patch_head.last_layer.weight" in dict(trained)) == (own is not None)
    assert not net.teacher.requires_grad_().training


def test_too_few_patches_to_hide_any_are_refused() -> None:
    with pytest.raises(UserError, match="hides nothing of 1 x 1 patches"):
        SelfDistillation(FAMILIES[0], SMALL, FFNConfig(), 4, 3, out_dim=8, ibot=IBOTConfig())
    with pytest.raises(UserError, match="hides nothing of 4 x 4 patches"):
        dino(ibot=IBOTConfig(mask_ratio=(0.01, 0.02)))


def test_flops_count_the_heads_of_hidden_patches() -> None:
    net, one = dino(ibot=IBOTConfig(out_dim=8, hidden_dim=5, bottleneck_dim=3)), views(1)
    student, teacher = net.flops_per_image([view.shape[-1] for view in one], masked_share=4 / 32)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :4] = True
    assert student + teacher == counted_flops(lambda: net.masked(one, mask, torch.arange(4)))


def test_the_teacher_is_a_running_average_of_the_student() -> None:
    net = dino(ffn="moa")
    old = start(net.teacher)
    shake(net.student)
    new = start(net.student)
    net.update_teacher(0.9)
    once = start(net.teacher)
    net.update_teacher(0.9)
    twice = start(net.teacher)
    moved = 0
    for name in old:
        assert torch.allclose(once[name], 0.9 * old[name] + 0.1 * new[name], atol=1e-6), name
        assert torch.allclose(twice[name], 0.81 * old[name] + 0.19 * new[name], atol=1e-6), name
        moved += not torch.equal(old[name], once[name])
    assert moved == len(old)
    assert all(torch.equal(new[name], value) for name, value in net.student.state_dict().items())


def test_momentum_one_holds_the_teacher_and_zero_copies_the_student() -> None:
    net = dino()
    old = start(net.teacher)
    shake(net.student)
    net.update_teacher(1.0)
    assert all(torch.equal(old[name], value) for name, value in net.teacher.state_dict().items())
    net.update_teacher(0.0)
    student = net.student.state_dict()
    assert all(torch.equal(student[name], value) for name, value in net.teacher.state_dict().items())


def test_outputs_are_cosines_with_unit_prototypes() -> None:
    head, x = shake(DINOHead(5, 7, 12, 6)), torch.randn(20, 5)
    codes, prototypes = head.mlp(x), head.last_layer.weight
    expected = torch.cosine_similarity(codes[:, None], prototypes[None], dim=-1)
    assert torch.allclose(head(x), expected, atol=1e-6)
    with torch.no_grad():
        prototypes *= 3
    assert torch.allclose(head(x), expected, atol=1e-6)


def test_learned_norms_scale_the_prototypes() -> None:
    head, x = shake(DINOHead(5, 7, 12, 6, norm_last_layer=False)), torch.randn(20, 5)
    cosine = torch.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight[None], dim=-1)
    assert torch.allclose(head(x), cosine * head.last_layer.norm[:, 0], atol=1e-6)
    assert DINOHead(5, 7).last_layer.norm is None


def test_paths_are_dropped_in_the_student_only() -> None:
    net = shake(dino(drop_path_rate=0.9)).train()
    first, second = net(views(16)), net(views(16))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not net.teacher.training


@every_family
def test_features_are_the_teachers(name: str) -> None:
    net = shake(dino(name))
    with torch.no_grad():
        features = net.features(images())
        assert features.shape == (2, 48)
        shake(net.student, seed=1)
        assert torch.equal(net.features(images()), features)
        assert torch.equal(net.eval().features(images()), features)


@every_family
def test_starts_depend_on_seed_and_name_alone(name: str) -> None:
    torch.manual_seed(1)
    first = start(dino(name, "moa_paper"))
    torch.manual_seed(2)
    second, other = start(dino(name, "moa_paper")), start(dino(name, "moa_paper", seed=1))
    assert all(torch.equal(first[n], second[n]) for n in first)
    drawn = ("backbone.patch_embed.proj.weight", "head.mlp.0.weight", "head.last_layer.weight")
    for n in drawn:
        assert not torch.equal(first[f"student.{n}"], other[f"student.{n}"]), n


@pytest.mark.parametrize("ffn", FFNS)
def test_variants_start_from_the_same_numbers(ffn: str) -> None:
    trunk = {
        "student.backbone.blocks.1.attn.qkv.weight",
        "student.head.last_layer.weight",
        "teacher.backbone.cls_token",
    }
    assert_same_where_shapes_agree(dino(), dino(ffn=ffn), trunk)


@pytest.mark.parametrize("name", [name for name in FAMILIES if "siglip" not in name])  # attention pooling is left out
def test_flops_are_those_that_torch_counts(name: str) -> None:
    net = dino(name, "moa_gated_pairs")
    student, teacher = net.flops_per_image([view.shape[-1] for view in views()])
    one = views(1)
    assert student == counted_flops(lambda: net.student(one))
    assert teacher == counted_flops(lambda: net.teacher(one[:2]))


@every_family
def test_a_saved_state_gives_the_same_outputs(name: str) -> None:
    first, second, file = shake(dino(name, "la")), dino(name, "la", seed=1), io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        outputs = zip(first.eval()(views()), second.eval()(views()), strict=True)
    assert all(torch.equal(a, b) for a, b in outputs)


def attention_maps(net: SelfDistillation, pixels: torch.Tensor) -> torch.Tensor:
    shares = look(net.teacher.backbone, pixels, net.features).attention
    assert shares is not None
    return shares


@every_family
def test_attention_maps_are_the_nets_own_attention(name: str) -> None:
    """As timm computes it where it does not leave it to torch's function: the class token's, or the patches' mean."""
    net = shake(dino(name))
    backbone, caught = net.teacher.backbone, []
    layer = backbone.blocks[-1].attn
    with torch.no_grad():
        shares = attention_maps(net, images())
        layer.fused_attn = False
        layer.attn_drop.register_forward_hook(lambda module, inputs, output: caught.append(inputs[0]))
        net.features(images())
    assert shares.shape == (2, 4, 4, 4)
    prefix = backbone.num_prefix_tokens
    rows = caught[0][:, :, :1] if backbone.cls_token is not None else caught[0][:, :, prefix:]  # (B, heads, n, N)
    assert torch.allclose(shares.flatten(2), rows.mean(2)[..., prefix:], atol=1e-6)
    assert (shares.flatten(2).amax(-1) - shares.flatten(2).amin(-1)).min() > 1e-4, "not all alike"


def test_looking_gives_the_features_and_the_last_blocks_patches_and_leaves_no_hook_behind() -> None:
    net, caught = dino(), []
    block = net.teacher.backbone.blocks[-1]
    block.register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        seen = look(net.teacher.backbone, images(), net.features)
        assert torch.equal(seen.features, net.features(images()))
    assert torch.equal(seen.patches, caught[0][:, 1:].unflatten(1, (4, 4)))
    assert (len(block._forward_hooks), len(block._forward_pre_hooks)) == (1, 0)


def test_images_and_crops_that_do_not_divide_into_patches_are_refused() -> None:
    with pytest.raises(UserError, match=r"18 pixels .* patches of 4"):
        SelfDistillation(FAMILIES[0], SMALL, FFNConfig(), 18, 3, out_dim=8)
    with pytest.raises(UserError, match=r"10 pixels .* patches of 4"):
        dino()([*views()[:2], images(size=10)])


@pytest.mark.parametrize(("name", "size"), NOT_PLAIN.items())
def test_nets_that_take_no_crops_of_other_sizes_are_refused_by_name(name: str, size: int) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=f"'{name}' is not a plain vision transformer"):
        SelfDistillation(name, {}, FFNConfig(), size, 3, out_dim=8)


def test_a_mistake_in_the_options_is_named() -> None:
    with torch.device("meta"), pytest.raises(UserError, match="unexpected keyword argument 'embed_dmi'"):
        SelfDistillation(FAMILIES[0], {"embed_dmi": 48}, FFNConfig(), IMAGE, 3, out_dim=8)


def test_the_maps_of_a_compiled_net_are_those_of_the_same_net() -> None:
    net = dino()
    expected = attention_maps(net, images())
    for block in net.teacher.backbone.blocks:
        block.compile(backend="eager")
    net.features(images())  # what is compiled before the hook is there does not see it
    found = attention_maps(net, images())
    assert torch.equal(found, expected)
