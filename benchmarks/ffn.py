"""What swapping the activation costs: the mix against one GELU, the feed-forward layer, a GPT's training step.

    python -m benchmarks.ffn op layer step        prints Markdown, writes benchmarks/results/ffn-<processor>.json

Every figure is forward and backward. Variants of a group run in turn in one process, and ratios are medians over rounds
of a variant's time by the baseline's in the same round, so that other load on the machine hits both. On the CPU, glibc
gives large freed blocks back to the system and faults them in again, which can cost more than an activation; set
MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_MAX_=0 to measure kernels and not page faults.
"""

import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_lightning import FeedForward, FFNConfig
from moa_lightning.activations import DICTIONARY
from moa_lightning.kernels import mix
from moa_lightning.models.gpt import GPT, GPTConfig
from moa_lightning.parallel import compile_blocks

TOKENS, DIM, HIDDEN = 2048, 384, 1536
RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = {
    "GELU": FFNConfig(),
    "MoA plain": FFNConfig("moa"),
    "SwiGLU": FFNConfig(form="gated", activation="silu"),
    "MoA both": FFNConfig("moa", "gated", "silu", branches="both"),
}
BASELINE = {"MoA plain": "GELU", "MoA both": "SwiGLU"}
Calls = dict[str, Callable[[], Any]]


def alternate(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `rounds` times; two rounds before that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(-2, rounds):
        for name, call in calls.items():
            _wait()
            start = time.perf_counter()
            call()
            _wait()
            if round_ >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def rows(group: str, seconds: dict[str, list[float]], baseline: Callable[[str], str | None]) -> list[dict[str, Any]]:
    """One row a variant: median milliseconds, and the ratio to its baseline round by round."""
    result = []
    for name, times in seconds.items():
        base = baseline(name)
        ratio = None if base is None else statistics.median(a / b for a, b in zip(times, seconds[base], strict=True))
        milliseconds = 1000 * statistics.median(times)
        result.append({"group": group, "variant": name, "ms": round(milliseconds, 2), "of": base, "ratio": ratio})
    return result


def op(rounds: int = 31) -> list[dict[str, Any]]:
    """The mix of seven activations, forward and backward, by each implementation, against one eager GELU."""
    found = []
    for name, dtype in DTYPES.items():
        u = torch.randn(TOKENS, HIDDEN, device=DEVICE, dtype=dtype, requires_grad=True)
        c = torch.randn(TOKENS, len(DICTIONARY), device=DEVICE, requires_grad=True)
        g = torch.randn_like(u)

        def both_ways(function: Callable[..., Tensor], *inputs: Tensor, g: Tensor = g) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(function(*inputs), inputs, g)

        calls: Calls = {
            "GELU": both_ways(F.gelu, u),
            "GELU, compiled": both_ways(torch.compile(lambda u: F.gelu(u)), u),
        }
        kernels = ("cpp" if DEVICE == "cpu" else "triton", "compiled", "recompute", "reference")
        for kernel in kernels:
            calls[f"mix, {kernel}"] = both_ways(lambda u, c, kernel=kernel: mix(u, c, DICTIONARY, kernel=kernel), u, c)
        calls["mix, auto in a compiled graph"] = both_ways(torch.compile(lambda u, c: mix(u, c, DICTIONARY)), u, c)
        calls["copy of u"] = lambda u=u: u.detach().clone()
        found += rows(f"op, {name}", alternate(calls, rounds), lambda variant: "GELU")
    return found


def layer(rounds: int = 15) -> list[dict[str, Any]]:
    """The feed-forward layer: gradients of the input and of every parameter."""
    found = []
    x = torch.randn(1, TOKENS, DIM, device=DEVICE, requires_grad=True)
    for precision in DTYPES:
        for how in ("eager", "compiled"):
            calls: Calls = {}
            for name, config in LAYERS.items():
                net = FeedForward(DIM, config, HIDDEN).to(DEVICE)
                function = net if how == "eager" else torch.compile(net)
                calls[name] = _forward_backward(function, net, x, precision)
            found += rows(f"layer, {precision}, {how}", alternate(calls, rounds), BASELINE.get)
    return found


def _forward_backward(
    function: Callable[[Tensor], Tensor], net: FeedForward, x: Tensor, precision: str
) -> Callable[[], None]:
    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            y = function(x)
        torch.autograd.grad(y, (x, *net.parameters()), torch.ones_like(y))

    return run


def step(rounds: int = 9) -> list[dict[str, Any]]:
    """A training step of a GPT (3 blocks, width 384, context 512, batch 4, 256 tokens in the vocabulary)."""
    found = []
    tokens = torch.randint(256, (4, 513), device=DEVICE)
    for precision in DTYPES:
        calls = {name: _training_step(config, tokens, precision) for name, config in LAYERS.items()}
        found += rows(f"GPT step, {precision}, compiled blocks", alternate(calls, rounds), BASELINE.get)
    return found


def _training_step(config: FFNConfig, tokens: Tensor, precision: str) -> Callable[[], None]:
    net = GPT(GPTConfig(depth=3, dim=DIM, num_heads=6), config, vocab_size=256, context_length=512).to(DEVICE)
    compile_blocks(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bfloat16"):
            logits = net(tokens[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def markdown(measured: list[dict[str, Any]]) -> str:
    lines = ["| what | variant | ms | ratio |", "| --- | --- | --- | --- |"]
    for row in measured:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} × {row['of']}"
        lines.append(f"| {row['group']} | {row['variant']} | {row['ms']} | {ratio} |")
    return "\n".join(lines)


def main(parts: list[str]) -> None:
    measured = [row for part in parts for row in {"op": op, "layer": layer, "step": step}[part]()]
    about = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "sizes": {"tokens": TOKENS, "dim": DIM, "hidden": HIDDEN},
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"ffn-{re.sub('[^a-z0-9]+', '-', about['device'].lower()).strip('-')}-{'-'.join(parts)}.json"
    file.write_text(json.dumps({"about": about, "rows": measured}, indent=1) + "\n")
    print(markdown(measured))


if __name__ == "__main__":
    main(sys.argv[1:] or ["op", "layer", "step"])
