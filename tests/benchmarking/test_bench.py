"""`moa bench`: what it leaves, that ratios come from alternated rounds, and that bytes are those of the tensors."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moa_lightning import FeedForward, FFNConfig, parallel
from moa_lightning.benchmarking import command, decode, layers, loading, steps
from moa_lightning.benchmarking.machine import QUICK, Machine, Setting
from moa_lightning.benchmarking.timing import Effort, alternate, keep_freed_memory, rows
from moa_lightning.benchmarking.traffic import bytes_per_token
from moa_lightning.mixing import MixCoefficients
from moa_lightning.models.trunk import LayerCache
from tests.cli.conftest import Moa
from tests.cli.conftest import _alone as _alone
from tests.cli.conftest import moa as moa  # the command in an empty folder

CPU = torch.device("cpu")
ONCE = Effort(rounds=3, seconds=0.0, warm_up=1)
SETTING = Setting(CPU, QUICK, ONCE, ("float32",))
MACHINE = Machine("none", {"float32": 1e9}, {"float32": 1e9}, {"float32": None})


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation takes minutes; what is compiled is tested elsewhere. The test process keeps its allocator."""
    for module in (layers, parallel):
        monkeypatch.setattr(module, "compiler_works", lambda: False)
    monkeypatch.setattr(command, "keep_freed_memory", lambda: True)


def test_the_whole_command_prints_tables_and_writes_what_they_say(moa: Moa) -> None:
    outcome = moa("bench --quick --device cpu --out results")
    assert outcome.code == 0, outcome.err
    (file,) = Path("results").glob("*.json")
    found = json.loads(file.read_text())
    assert found["about"]["name"] in outcome.out
    assert {"copy", "product", "peak", "threads", "torch", "malloc", "sizes", "effort"} <= found["about"].keys()
    groups = {row["group"] for row in found["rows"]}
    wanted = ("op, plain", "op, gated", "layer", "GPT step", "ViT-MAE step", "one token", "image shards", "text shards")
    assert all(any(group.startswith(name) for group in groups) for name in wanted)
    for row in found["rows"]:
        assert row["ms"] > 0
        assert row["rounds"] == command.SHORT.rounds
        assert (row["of"] is None) == (row["ratio"] is None)
        if row["of"]:
            assert any(r["group"] == row["group"] and r["variant"] == row["of"] for r in found["rows"])
            assert row["quartiles"][0] <= row["ratio"] <= row["quartiles"][1]
        assert f"| {row['variant']} |" in outcome.out
    assert file.with_suffix(".md").read_text().strip() in outcome.out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("bench everything", "'everything' is unknown; choose from op, layer, step, decode, data"),
        ("bench op --fast", "unrecognized arguments: --fast"),
        ("bench op --device tpu", "--device is 'tpu'; choose from cpu, cuda"),
        ("bench op --out", "argument --out: expected one argument"),
    ],
)
def test_a_mistake_is_one_sentence(moa: Moa, line: str, sentence: str) -> None:
    outcome = moa(line)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(moa: Moa) -> None:
    Path("results").write_text("a file")
    outcome = moa("bench op --out results")
    assert outcome.code == 2
    assert "--out 'results' cannot be written" in outcome.err


def test_variants_run_in_turn() -> None:
    order: list[str] = []
    seconds = alternate({name: partial(order.append, name) for name in "ab"}, ONCE, CPU)
    assert "".join(order) == "abababab"  # a round to warm up, then three
    assert [len(times) for times in seconds.values()] == [3, 3]
    order.clear()
    alternate({name: partial(order.append, name) for name in "ab"}, ONCE, CPU, before=partial(order.append, "-"))
    assert "".join(order) == "-a-b" * 4


def test_a_ratio_is_the_median_over_rounds_and_not_that_of_the_medians() -> None:
    found = {row.variant: row for row in rows("g", {"a": [1.0, 10.0, 4.0], "b": [2.0, 10.0, 12.0]}, {"b": "a"})}
    assert found["b"].ratio == 2.0  # of 2, 1 and 3; the medians are 4 and 10
    assert (found["a"].ms, found["a"].ratio) == (4000.0, None)


class Traffic(TorchDispatchMode):
    """Bytes of every tensor that goes into and comes out of the named operations."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.bytes = names, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.names:
            self.bytes += sum(t.nbytes for t in tree_leaves((args, result)) if isinstance(t, Tensor))
        return result


CONFIGS = {
    "gelu": FFNConfig(),
    "plain": FFNConfig("moa"),
    **{name: FFNConfig("moa", "gated", "silu", branches=name) for name in ("one", "both", "pairs")},  # type: ignore[arg-type]
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_the_formula_are_those_of_the_tensors(name: str, dtype: torch.dtype) -> None:
    tokens, dim, hidden = 6, 8, 24
    net = FeedForward(dim, CONFIGS[name], hidden).to(dtype)
    for module in net.modules():
        if isinstance(module, MixCoefficients):
            module.float()
    x = torch.randn(tokens, dim, dtype=dtype)
    with Traffic("gelu", "gelu_backward", "mix", "mix_backward") as counted:
        net(x).sum().backward()
    assert counted.bytes == tokens * bytes_per_token(hidden, CONFIGS[name], dtype.itemsize)


def test_a_step_counts_the_bytes_of_all_its_layers() -> None:
    step = steps.mae_step(SETTING, FFNConfig("moa"), "float32")
    with Traffic("mix", "mix_backward") as counted:
        step()
    assert step.activation_bytes() == counted.bytes


def test_more_parameters_and_activations_are_more_memory() -> None:
    small = steps.counted_peak(steps.gpt_step(SETTING, FFNConfig(), "float32"))
    gated = steps.counted_peak(steps.gpt_step(SETTING, FFNConfig(form="gated", activation="silu"), "float32"))
    weights = 4 * QUICK.dim * QUICK.hidden * 4  # of the third projection: itself, its gradient and Adam's two moments
    assert gated > small + weights


def test_what_is_measured_is_a_mix_that_training_has_moved() -> None:
    net = layers.trained(FeedForward(8, FFNConfig("moa"), 16))
    (mix,) = [module for module in net.modules() if isinstance(module, MixCoefficients)]
    coefficients = mix.coefficients(torch.randn(5, 8))
    assert (coefficients != 0).all()
    assert (coefficients.std(0) > 0).all()


@pytest.mark.parametrize("stack", [decode.feedforward_stack, decode.gpt])
def test_one_token_goes_through_every_layer_without_autograd(stack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stack(SETTING, FFNConfig("moa"), torch.float32)
    seen = []

    def forward(self: FeedForward, x: Tensor) -> Tensor:
        seen.append((x.shape, torch.is_inference_mode_enabled()))
        return x

    monkeypatch.setattr(FeedForward, "forward", forward)
    tokens()
    assert seen == [((1, 1, QUICK.dim), True)] * QUICK.decode_layers * decode.REPEATS


def test_decoding_reads_a_long_past_and_forgets_the_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    read = LayerCache.append

    def append(self: LayerCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = read(self, keys, values)
        lengths.append(found[0].shape[2])
        return found

    monkeypatch.setattr(LayerCache, "append", append)
    tokens = decode.gpt(SETTING, FFNConfig("moa"), torch.float32)
    for _ in range(2):
        lengths.clear()
        tokens()
        assert lengths[:: QUICK.decode_layers] == list(range(QUICK.context - decode.REPEATS + 1, QUICK.context + 1))


def test_the_limit_reads_every_member_and_the_loader_every_sample(tmp_path: Path) -> None:
    source = loading.image_shards(tmp_path, QUICK)
    assert [source.decode(content).shape for content in loading.members(source.paths)] == [(3, 64, 64)] * 16
    module = source.module(0)
    module.setup("fit")
    assert sum(len(batch["id"]) for batch in module.train_dataloader()) == QUICK.stored_images


def test_the_part_that_bounds_is_named() -> None:
    took = {loading.READ: 1.0, loading.LIMIT: 5.0, loading.SAMPLES: 14.0, loading.LOADER: 15.0, "shared": 100.0}
    measured = rows("g", {name: [ms / 1000] for name, ms in took.items()}, {})
    loading._name_bound(measured, workers=2)
    notes = {row.variant: row.note for row in measured if row.note}
    assert notes[loading.LOADER] == "bound by order and views, 60% of its time"
    assert notes["shared"] == "bound by passing batches between processes, 92% of its time"


def test_glibc_is_asked_to_keep_memory_and_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda name, value: asked.append((name, value)) or 1)
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    assert keep_freed_memory()
    assert asked == [(-4, 0), (-1, -1)]
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()
