"""What a step of decoding costs at batch 1: one token through N feed-forward layers, and through a GPT's N blocks.

With one token there is nothing to hide behind: every weight is read for one product, and each operation's own start
counts. The GPT reads each token with the keys and values of nearly a whole context behind it, as in `moa generate`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from ..feedforward import FeedForward, FFNConfig
from ..models import GPT, GPTConfig
from .layers import BASELINES, VARIANTS, trained
from .machine import DTYPES, Machine, Setting
from .timing import Row, alternate, rows

REPEATS = 10  # a token takes about a millisecond, which is too little to time alone


def feedforward_stack(setting: Setting, ffn: FFNConfig, dtype: torch.dtype) -> Callable[[], None]:
    """REPEATS times one token through N feed-forward layers."""
    sizes = setting.sizes
    layers = [FeedForward(sizes.dim, ffn, sizes.hidden) for _ in range(sizes.decode_layers)]
    net = trained(nn.Sequential(*layers)).to(setting.device, dtype).eval()
    token = torch.randn(1, 1, sizes.dim, device=setting.device, dtype=dtype)

    @torch.inference_mode()
    def tokens() -> None:
        for _ in range(REPEATS):
            net(token)

    return tokens


def gpt(setting: Setting, ffn: FFNConfig, dtype: torch.dtype) -> Callable[[], None]:
    """REPEATS tokens through a GPT of N blocks, embedding and head included, each after all before it."""
    sizes = setting.sizes
    ffn = replace(ffn, bias=False, hidden_ratio=sizes.hidden / sizes.dim)
    net = GPT(GPTConfig(sizes.decode_layers, sizes.dim, sizes.heads), ffn, sizes.vocab, sizes.context)
    trained(net).to(setting.device, dtype).eval()
    text = torch.zeros(1, sizes.context - REPEATS, dtype=torch.int64, device=setting.device)
    cache = net.new_cache()
    assert cache is not None  # the net has no experts
    with torch.inference_mode():
        net(text, cache)
    read = cache.length

    @torch.inference_mode()
    def tokens() -> None:
        for layer in cache.layers:  # forget what the call before read
            layer.length = read
        for _ in range(REPEATS):
            net(text[:, :1], cache)

    return tokens


def decode(setting: Setting, machine: Machine) -> list[Row]:
    """Milliseconds a token, eager, all variants."""
    sizes = setting.sizes
    stacks = {
        f"{sizes.decode_layers} feed-forward layers": feedforward_stack,
        f"a GPT of {sizes.decode_layers} blocks with {sizes.context - REPEATS} tokens behind it": gpt,
    }
    found = []
    for dtype in setting.dtypes:
        for what, build in stacks.items():
            calls = {name: build(setting, ffn, DTYPES[dtype]) for name, ffn in VARIANTS.items()}
            seconds = alternate(calls, setting.effort, setting.device)
            found += rows(f"one token through {what}, {dtype}", seconds, BASELINES, REPEATS)
    return found
