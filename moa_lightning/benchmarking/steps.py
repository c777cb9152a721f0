"""A training step (forward, loss, backward, fused AdamW) of a GPT and of a masked autoencoder, its MFU and its memory.

The blocks are compiled, as `model.compile` does it, and on a GPU the GPT is the one of 124 million parameters under
bfloat16. MFU is Chowdhery et al.'s (arXiv 2204.02311, appendix B): FLOPs of the matrix products that the net needs,
three times those of a forward pass, over the step's time and the device's peak. Where no data sheet is known, the share
of a measured matrix product stands in for it.

Memory: on a GPU the allocator's own peak during a step. On the CPU, bytes held by tensors are counted operation by
operation in a step without compilation, whose buffers no operation shows; the scratch memory inside one operation is
not seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..feedforward import FeedForward, FFNConfig
from ..losses import masked_pixel_loss
from ..models import GPT, GPTConfig, MaskedAutoencoder
from ..parallel import compile_blocks
from ..planning.tracker import Tracker, local_bytes
from .layers import BASELINES, VARIANTS, trained
from .machine import DTYPES, Machine, Setting
from .timing import Row, alternate, rows
from .traffic import bytes_per_token

GRAPHS = 64  # all variants share the code of a block; past torch's own limit of 8 graphs a block would run eagerly


class Step:
    """One training step of a net on a batch that stays the same.

    Args:
        net: on the device already.
        loss: of the net, a scalar.
        dtype: bfloat16 runs under autocast.
        flops: of the matrix products of forward and backward.
        tokens: that pass through each feed-forward layer, by the name of what holds it.
    """

    def __init__(
        self, net: nn.Module, loss: Callable[[], Tensor], dtype: str, flops: float, tokens: dict[str, int]
    ) -> None:
        self.net, self.loss, self.dtype, self.flops, self.tokens = net, loss, dtype, flops, tokens
        parameters = [p for p in trained(net).parameters() if p.requires_grad]
        self.device = parameters[0].device
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16"):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def activation_bytes(self) -> int:
        """Bytes that the activations of all feed-forward layers move at the least in this step."""
        total = 0
        for part, tokens in self.tokens.items():
            for module in self.net.get_submodule(part).modules():
                if isinstance(module, FeedForward):
                    total += tokens * bytes_per_token(module.hidden_dim, module.config, DTYPES[self.dtype].itemsize)
        return total


Build = Callable[[Setting, FFNConfig, str], Step]


def gpt_step(setting: Setting, ffn: FFNConfig, dtype: str) -> Step:
    """A GPT on random tokens."""
    sizes = setting.sizes
    config = GPTConfig(sizes.depth, sizes.dim, sizes.heads, tie_embeddings=True)
    ffn = replace(ffn, bias=False, hidden_ratio=sizes.hidden / sizes.dim)
    net = GPT(config, ffn, sizes.vocab, sizes.context).to(setting.device)
    batch = max(1, sizes.tokens // sizes.context)
    tokens = torch.randint(sizes.vocab, (batch, sizes.context + 1), device=setting.device)

    def loss() -> Tensor:
        logits = net(tokens[:, :-1]).float()
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    count = batch * sizes.context
    return Step(net, loss, dtype, 3.0 * net.flops_per_token() * count, {"blocks": count})


def mae_step(setting: Setting, ffn: FFNConfig, dtype: str) -> Step:
    """A masked autoencoder on random images."""
    sizes = setting.sizes
    size = {"embed_dim": sizes.vit_dim, "depth": sizes.vit_depth, "num_heads": _heads(sizes.vit_dim)}
    net = MaskedAutoencoder(
        "vit_small_patch16_224", size, ffn, ffn, sizes.image, 3, decoder_dim=sizes.decoder_dim,
        decoder_depth=sizes.decoder_depth, decoder_heads=_heads(sizes.decoder_dim),
    ).to(setting.device)  # fmt: skip
    images = torch.randn(sizes.images, 3, sizes.image, sizes.image, device=setting.device)
    noise = torch.rand(sizes.images, net.num_patches, device=setting.device)

    def loss() -> Tensor:
        predicted, mask = net(images, noise, visible=False)
        return masked_pixel_loss(predicted, net.patchify(images), mask)

    prefix, kept = net.selector.num_prefix_tokens, int(net.num_patches * (1 - net.mask_ratio))
    *whole, last = (f"decoder.blocks.{n}" for n in range(sizes.decoder_depth))
    each = {"encoder": prefix + kept, **dict.fromkeys(whole, prefix + net.num_patches), last: net.num_patches - kept}
    tokens = {part: sizes.images * count for part, count in each.items()}
    return Step(net, loss, dtype, 3.0 * net.flops_per_image() * sizes.images, tokens)


def _heads(dim: int) -> int:
    """Attention heads of 64 channels."""
    return max(1, dim // 64)


NETS: dict[str, Build] = {"GPT": gpt_step, "ViT-MAE": mae_step}


def step(setting: Setting, machine: Machine) -> list[Row]:
    """Time and memory of the steps, all variants."""
    dtypes = setting.dtypes[-1:] if setting.device.type == "cuda" else setting.dtypes
    return [row for dtype in dtypes for net in NETS for row in _group(setting, machine, net, dtype)]


def _group(setting: Setting, machine: Machine, net: str, dtype: str) -> Iterator[Row]:
    steps = {name: NETS[net](setting, ffn, dtype) for name, ffn in VARIANTS.items()}
    peaks: dict[str, int] = {}
    if setting.device.type == "cpu":  # before compilation
        peaks = {name: counted_peak(step) for name, step in steps.items()}
    for one in steps.values():
        compile_blocks(one.net)
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        seconds = alternate(steps, setting.effort, setting.device)
    if setting.device.type == "cuda":
        peaks = {name: allocated_peak(step) for name, step in steps.items()}
    for row in rows(f"{net} step, {dtype}", seconds, BASELINES):
        one = steps[row.variant]
        row.figures = {
            **_speed(setting, net, one, row.ms / 1e3),
            **_shares(machine, one, row.ms / 1e3),
            "peak MB": peaks[row.variant] / 1e6,
        }
        if row.of is not None:
            row.figures["memory ratio"] = peaks[row.variant] / peaks[row.of]
        yield row


def _speed(setting: Setting, net: str, step: Step, seconds: float) -> dict[str, float]:
    if net == "GPT":
        return {"tokens/s": step.tokens["blocks"] / seconds}
    return {"images/s": setting.sizes.images / seconds}


def _shares(machine: Machine, step: Step, seconds: float) -> dict[str, float]:
    """MFU, and what the step's activations cost at the speed of a copy."""
    rate = step.flops / seconds
    peak = machine.peak[step.dtype]
    shares = {"of a product": rate / machine.product[step.dtype]} if peak is None else {"MFU": rate / peak}
    moved = step.activation_bytes()
    at_copy_speed = moved / machine.copy[step.dtype]
    return {"TFLOP": step.flops / 1e12, **shares, "activation MB": moved / 1e6, "of the step": at_copy_speed / seconds}


def counted_peak(step: Step) -> int:
    """Bytes that tensors hold at the worst moment of a step, the second one: the optimiser has its state."""
    step()
    with Tracker() as tracker:
        step()
    return local_bytes(_state(step)) + tracker.peak


def allocated_peak(step: Step) -> int:
    """Bytes that the GPU's allocator had given out at the worst moment of a step, less what other nets hold."""
    others = torch.cuda.memory_allocated(step.device) - local_bytes(_state(step))
    torch.cuda.reset_peak_memory_stats(step.device)
    step()
    torch.cuda.synchronize(step.device)
    return torch.cuda.max_memory_allocated(step.device) - others


def _state(step: Step) -> Iterator[Tensor]:
    yield from step.net.parameters()
    yield from step.net.buffers()
    for state in step.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
