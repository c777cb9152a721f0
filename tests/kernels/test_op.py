"""The mix as torch sees it, one operation each way, and which implementation computes it."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moa_lightning import FeedForward, FFNConfig, UserError, activations, register_activation
from moa_lightning.kernels import KERNELS, choice, compiled, cpp, mix, recompute, triton_mix
from tests.layers import bytes_of, every_form, randomise, saved_tensors
from tests.reference import SEVEN

NAMES = ("identity", "silu", "tanh")
needs_cpp = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _choose_afresh():
    choice._choose.cache_clear()
    torch.compiler.reset()
    torch.manual_seed(0)
    yield
    choice._choose.cache_clear()


def layer(form: str, branches: str, kernel: str = "auto", mixing: str = "moa") -> FeedForward:
    result = FeedForward(8, FFNConfig(mixing, form, "silu", NAMES, branches, kernel=kernel), hidden_dim=20)
    randomise(result)
    return result


def tensors(form: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor | None, ...]:
    """a, c, b, e of a mix in that form."""
    draw = torch.Generator().manual_seed(0)
    entries = (3, 3) if form == "pairs" else (3,)
    a, b = (torch.randn(4, 5, generator=draw).to(dtype).requires_grad_() for _ in range(2))
    c, e = (torch.randn(4, *entries, generator=draw).requires_grad_() for _ in range(2))
    return a, c, None if form == "plain" else b, e if form == "both" else None


@pytest.mark.parametrize("form", ["plain", "one", "both", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_torch_finds_the_operation_sound(form: str, dtype: torch.dtype) -> None:
    """Schema, fake kernel, registration of autograd, and what AOTAutograd makes of it."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.moa.mix, (*tensors(form, dtype), list(NAMES), form, "auto"), test_utils=tests)


@needs_cpp
def test_a_compiled_graph_calls_one_operation_each_way() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    from torch._dynamo.backends.common import aot_autograd

    net = layer("gated", "both")
    torch.compile(net, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(torch.randn(3, 8)).sum().backward()
    calls = [target for graph in graphs for target in graph if "moa" in target]
    assert calls == ["moa.mix.default", "moa.mix_backward.default"]


@every_form
@pytest.mark.parametrize("kernel", ["auto", "compiled", "recompute", "reference"])
def test_compiled_and_checkpointed_layers_agree_with_eager_ones(form: str, branches: str, kernel: str) -> None:
    net, x = layer(form, branches, kernel), torch.randn(3, 8)
    eager = layer(form, branches)
    eager(x).square().sum().backward()
    twin = copy.deepcopy(net)
    outputs = [torch.compile(net, backend="aot_eager", fullgraph=True)(x)]
    if kernel != "compiled":
        outputs.append(checkpoint(twin, x, use_reentrant=False))
    for ours, y in zip((net, twin), outputs, strict=False):
        y.square().sum().backward()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_policy_can_name_the_operation() -> None:
    """What the policy keeps is not computed again."""
    seen = {"mix": 0}

    def policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if op is torch.ops.moa.mix.default:
            seen["mix"] += not ctx.is_recompute
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    net, x = layer("plain", "one"), torch.randn(3, 8, requires_grad=True)
    checkpoint(
        net, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    ).sum().backward()
    kept = x.grad.clone()
    x.grad = None
    net(x).sum().backward()
    assert seen["mix"] == 1
    torch.testing.assert_close(kept, x.grad)


@every_form
def test_an_exported_layer_holds_one_operation_and_computes_the_same(form: str, branches: str) -> None:
    net, x = layer(form, branches).eval(), torch.randn(3, 8)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    assert [str(n.target) for n in program.graph.nodes if "moa" in str(n.target)] == ["moa.mix.default"]
    longer = torch.randn(7, 8)
    torch.testing.assert_close(program.module()(longer), net(longer))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixing", ["la", "moa"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-autocast"])
@every_form
def test_a_mix_stores_what_the_fixed_layer_stores_and_its_coefficients(form, branches, autocast, mixing) -> None:
    tokens, hidden, dim = 40, 256, 16
    stored = []
    for member in ("fixed", mixing):
        config = FFNConfig(member, form, "silu", branches=branches if member != "fixed" else "one")
        net = FeedForward(dim, config, hidden_dim=hidden)
        x = torch.randn(tokens, dim, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saved_tensors() as saved:
            net(x)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        unique = {t.untyped_storage().data_ptr(): t for t in saved}
        # weights, and under autocast their bfloat16 copies, are no part of the activations
        kept = [t for p, t in unique.items() if p not in weights and tokens in t.shape]
        stored.append(bytes_of(*kept))
    coefficients = 4 * tokens * config.entries * config.mixed_branches if mixing == "moa" else 0
    assert stored[1] <= stored[0] + coefficients


# --- the choice -------------------------------------------------------------------------------------------------------


@needs_cpp
def test_auto_on_the_cpu_is_the_cpp_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choice._choose("auto", SEVEN, dtype, torch.float32, "cpu") is cpp
    assert choice._choose("auto", SEVEN, torch.float64, torch.float64, "cpu") is recompute


def test_auto_on_a_gpu_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert choice._choose("auto", SEVEN, torch.bfloat16, torch.float32, "cuda") is triton_mix
    monkeypatch.setattr(compiled, "compiler_works", lambda: True)
    assert choice._choose("auto", SEVEN, torch.float64, torch.float64, "cuda") is compiled


def test_a_layer_computes_the_same_with_every_kernel() -> None:
    x = torch.randn(3, 8)
    expected = layer("gated", "both")(x)
    for kernel in sorted(set(KERNELS) - {"triton", "compiled"} - (set() if cpp.available() else {"cpp"})):
        torch.testing.assert_close(layer("gated", "both", kernel)(x), expected)


def test_an_activation_of_the_users_is_computed_and_the_detour_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_POINTWISE", dict(activations._POINTWISE))
    register_activation("mish", F.mish)
    choice._say_unknown.cache_clear()
    a, c = torch.randn(4, 5), torch.tensor([0.5, 2.0])
    with caplog.at_level(logging.WARNING):
        for kernel in ("auto", "auto", "cpp"):
            torch.testing.assert_close(mix(a, c, ("identity", "mish"), kernel=kernel), 0.5 * a + 2 * F.mish(a))
    assert [record.message.count("mish") for record in caplog.records] == [1]


def test_without_a_compiler_torch_operations_serve_and_say_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    a, c = torch.randn(4, 5), torch.randn(4, 7)
    expected = mix(a, c, SEVEN)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    for cached in (cpp.available, cpp._library):
        cached.cache_clear()
    choice._choose.cache_clear()
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(mix(a, c, SEVEN), expected)
        mix(a.double(), c, SEVEN), mix(a, c, SEVEN)
    assert ["no C++ compiler" in record.message for record in caplog.records] == [True]
    with pytest.raises(UserError, match=r"ffn.kernel is 'cpp', which does not work here"):
        mix(a, c, SEVEN, kernel="cpp")
    cpp.available.cache_clear()


def test_a_broken_compiler_is_like_none(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho no such target >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (cpp.available, cpp._library):
        cached.cache_clear()
    assert not cpp.available()
    cpp.available.cache_clear()


@needs_cpp
def test_the_kernel_is_built_once_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    build = cpp._build
    monkeypatch.setattr(cpp, "_build", lambda *arguments: (built.append(1), build(*arguments)))
    for _ in range(2):
        cpp._library.cache_clear()
        mix(torch.randn(4, 5), torch.randn(4, 2), ("identity", "relu"))
    cpp._library.cache_clear()
    libraries = list((tmp_path / "moa_lightning").iterdir())
    assert len(built) == len(libraries) >= 1
    assert {file.suffix for file in libraries} == {".so"}


def test_a_kernel_that_cannot_do_it_is_refused() -> None:
    a, c = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 7)
    with pytest.raises(UserError, match=r"'cpp', which does not work here for torch.float64 tensors on 'cpu'"):
        mix(a, c, SEVEN, kernel="cpp")
    with pytest.raises(UserError, match=r"ffn.kernel is 'magic'; choose from auto, reference"):
        FFNConfig("moa", kernel="magic")
    with pytest.raises(UserError, match="branches of a gated mix"):
        mix(a, c, SEVEN, a.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("branches", [None, "one", "both", "pairs"])
def test_at_the_identity_start_a_layer_computes_what_the_fixed_one_does_to_the_bit(branches, dtype):
    torch.manual_seed(0)
    shape = {"form": "gated", "branches": branches} if branches else {"form": "plain"}
    fixed = FeedForward(16, FFNConfig("fixed", activation="silu", form=shape["form"]))
    mixed = FeedForward(16, FFNConfig("moa", activation="silu", **shape))
    mixed.load_state_dict(fixed.state_dict(), strict=False)
    x = torch.randn(5, 7, 16)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        assert torch.equal(mixed(x), fixed(x))
    for parameter in (p for name, p in mixed.named_parameters() if name.endswith(".base")):
        parameter.data += 0.01
    assert not torch.equal(mixed(x), fixed(x))
