"""What a step of decoding costs at batch 1: one token through N feed-forward layers, and through a GPT's N blocks.

With one token there is nothing to hide behind: every weight is read for one product, and each operation's own start
counts. The blocks see the token without a past, so attention over earlier tokens is not in the figure.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..feedforward import FeedForward, FFNConfig
from ..models import GPT, GPTConfig
from .layers import BASELINES, VARIANTS, trained
from .machine import DTYPES, Machine, Setting
from .timing import Row, alternate, rows

REPEATS = 10  # a token takes about a millisecond, which is too little to time alone


def feedforward_stack(setting: Setting, ffn: FFNConfig, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One token through N feed-forward layers."""
    sizes = setting.sizes
    layers = [FeedForward(sizes.dim, ffn, sizes.hidden) for _ in range(sizes.decode_layers)]
    net = trained(nn.Sequential(*layers)).to(setting.device, dtype).eval()
    return partial(net, torch.randn(1, 1, sizes.dim, device=setting.device, dtype=dtype))


def blocks(setting: Setting, ffn: FFNConfig, dtype: torch.dtype) -> Callable[[], Tensor]:
    """One token through a GPT of N blocks, embedding and head included."""
    sizes = setting.sizes
    ffn = replace(ffn, bias=False, hidden_ratio=sizes.hidden / sizes.dim)
    net = GPT(GPTConfig(sizes.decode_layers, sizes.dim, sizes.heads), ffn, sizes.vocab, sizes.context)
    return partial(
        trained(net).to(setting.device, dtype).eval(), torch.zeros(1, 1, dtype=torch.int64, device=setting.device)
    )


STACKS = {"feed-forward layers": feedforward_stack, "GPT blocks": blocks}


def decode(setting: Setting, machine: Machine) -> list[Row]:
    """Milliseconds a token, eager, all variants."""
    found = []
    for dtype in setting.dtypes:
        for what, build in STACKS.items():
            calls = {name: partial(_tokens, build(setting, ffn, DTYPES[dtype])) for name, ffn in VARIANTS.items()}
            seconds = alternate(calls, setting.effort, setting.device)
            group = f"one token through {setting.sizes.decode_layers} {what}, {dtype}"
            found += rows(group, seconds, BASELINES, REPEATS)
    return found


@torch.inference_mode()
def _tokens(token: Callable[[], Tensor]) -> None:
    for _ in range(REPEATS):
        token()
