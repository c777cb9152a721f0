"""The trunk of a GPT: RMSNorm, rotary positions, query-key norm, grouped-query attention, and the feed-forward layer as
a part.

    x = embed(tokens);  x += attn(norm1(x)), x += mlp(norm2(x)) per block;  norm(x)

Pre-norm decoder without biases, after what recent open trainers agree on: rotary positions (Su et al., arXiv
2104.09864), RMSNorm (Zhang and Sennrich, arXiv 1910.07467), RMS-normalised queries and keys (Henry et al., arXiv
2010.04245), grouped-query attention (Ainslie et al., arXiv 2305.13245). The projections into the residual stream start
at zero, so each block starts as the identity. The feed-forward layer may be a mixture of experts (moe.py); attention
may have a gate and the norms may be point-wise (places.py).

Documents that share a sequence can be kept apart: a token then attends to its own document only. Positions go on across
documents, because rotary scores depend on distances alone. The mask is made once for all blocks and given to torch's
scaled_dot_product_attention, which has kernels with a mask for every device and dtype.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..experts import StackedLinear
from ..feedforward import FeedForward, FFNConfig, flops_per_token, matched_hidden_dim, parameter_count
from ..moe import MoE, MoEConfig, Router, Routing, moe_flops_per_token, moe_parameter_count
from ..places import (
    OutputGate,
    Scale,
    gate_flops_per_token,
    gate_parameter_count,
    language_norm,
    norm_flops_per_token,
    norm_parameter_count,
)

EMBEDDING_STD = 0.02  # of the embedding at the start


@dataclass(frozen=True)
class GPTConfig:
    """The size of a GPT."""

    depth: int = 4
    """blocks"""
    dim: int = 128
    """model width"""
    num_heads: int = 4
    """query heads"""
    num_kv_heads: int | None = None
    """key-value heads; None: as many as query heads"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    qk_norm: bool = True
    """normalise queries and keys per head"""
    tie_embeddings: bool = False
    """use the token embedding as the output matrix"""

    def __post_init__(self) -> None:
        for name in ("depth", "dim", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"gpt.{name} is {getattr(self, name)} but must be at least 1")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(f"gpt.dim {self.dim} must be an even multiple of gpt.num_heads {self.num_heads}")
        if self.num_kv_heads is not None and self.num_kv_heads < 1:
            raise UserError(f"gpt.num_kv_heads is {self.num_kv_heads}; give a number of at least 1, or null")
        if self.num_heads % self.kv_heads:
            raise UserError(f"gpt.num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"gpt.rope_theta is {self.rope_theta}; give a finite number above 0")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


def rotary_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, float32 (length, head_dim / 2) each."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def document_mask(documents: Tensor) -> Tensor:
    """Which token may attend to which, bool (B, 1, T, T): to those of its document that are not later.

    Args:
        documents: the number of each token's document, integers (B, T).
    """
    length = documents.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & earlier


class LayerCache:
    """Keys and values of the tokens that one block has seen, with room for `room` tokens."""

    def __init__(self, room: int) -> None:
        self.room, self.length = room, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep those of further tokens (B, heads, T, head_dim); returns all so far."""
        if self.keys is None or self.values is None:
            shape = (*keys.shape[:2], self.room, keys.shape[3])
            self.keys, self.values = keys.new_empty(shape), values.new_empty(shape)
        before, self.length = self.length, self.length + keys.shape[2]
        self.keys[:, :, before : self.length], self.values[:, :, before : self.length] = keys, values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def mask(self, length: int, keys: Tensor) -> Tensor | None:
        """Which keys (B, heads, S, head_dim) the last `length` tokens see, bool, to be broadcast to (B, heads, length,
        S); None: all before them and themselves."""
        before = keys.shape[2] - length
        if before == 0 or length == 1:  # a single token sees all before it
            return None
        return torch.ones(length, before + length, dtype=torch.bool, device=keys.device).tril(before)


class Cache:
    """What a GPT keeps of the tokens that it has read, to continue them: one LayerCache a block."""

    def __init__(self, depth: int, room: int) -> None:
        self.layers = [LayerCache(room) for _ in range(depth)]

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.layers[0].length


class Attention(nn.Module):
    """Causal self-attention, x (B, T, d) -> (B, T, d); with a cache, also to the tokens before these; with a mask, bool
    (B, 1, T, T), to what it allows instead."""

    def __init__(self, config: GPTConfig, ffn: FFNConfig = FFNConfig()) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = config.head_dim, config.num_heads, config.kv_heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.output_gate = None if ffn.attention_gate == "none" else OutputGate(config.dim, config.dim, ffn)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            self.qkv(x)
            .view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim)
            .transpose(1, 2)
            .split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        )  # each (B, heads, T, head_dim)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k = q.to(v.dtype), k.to(v.dtype)
        if cache is not None:
            k, v = cache.append(k, v)
            mask = cache.mask(length, k)
        causal = mask is None and k.shape[2] == length
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.kv_heads != self.heads
        )
        y = y.transpose(1, 2).reshape(batch, length, dim)
        return self.proj(y if self.output_gate is None else self.output_gate(x, y))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream; x (B, T, d) -> (B, T, d)."""

    def __init__(self, config: GPTConfig, ffn: FFNConfig) -> None:
        super().__init__()
        self.norm1 = language_norm(config.dim, ffn, before_attention=True)
        self.attn = Attention(config, ffn)
        self.norm2 = language_norm(config.dim, ffn)
        self.mlp = FeedForward(config.dim, ffn)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cache, mask)
        return x + self.mlp(self.norm2(x))


class MoEBlock(nn.Module):
    """A Block whose feed-forward layer is a mixture of experts; returns what its router did besides x."""

    def __init__(self, config: GPTConfig, ffn: FFNConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.norm1 = language_norm(config.dim, ffn, before_attention=True)
        self.attn = Attention(config, ffn)
        self.norm2 = language_norm(config.dim, ffn)
        self.mlp = MoE(config.dim, ffn, moe)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Routing]:
        x = x + self.attn(self.norm1(x), cos, sin, cache, mask)
        y, routing = self.mlp(self.norm2(x), real)
        return x + y, routing


class Trunk(nn.Module):
    """Embedding, blocks and last norm: tokens int64 (B, T) -> (B, T, d). Base of nets that put a head behind it.

    Args:
        config: the size.
        ffn: the feed-forward layer of every block.
        vocab_size: number of token ids.
        context_length: longest input in tokens.
        moe: experts in place of every block's feed-forward layer.

    Attributes:
        chooses_from_sequences: experts choose tokens, so outputs depend on the whole input, also on its length.
        routing: what the routers did in the last forward pass, each tensor with the blocks on its first axis; None
            without experts.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, ffn: FFNConfig, vocab_size: int, context_length: int, moe: MoEConfig) -> None:
        super().__init__()
        self.config, self.ffn, self.moe, self.context_length = config, ffn, moe, context_length
        self.routing: Routing | None = None
        self.chooses_from_sequences = moe.chooses_from_sequences
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.embed_scale = None if ffn.pointwise_norm == "none" else Scale(1 / EMBEDDING_STD)
        self.blocks = nn.ModuleList(
            MoEBlock(config, ffn, moe) if moe.experts else Block(config, ffn) for _ in range(config.depth)
        )
        self.norm = language_norm(config.dim, ffn)
        cos, sin = rotary_table(context_length, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def _features(
        self, tokens: Tensor, cache: Cache | None, documents: Tensor | None, lengths: Tensor | None = None
    ) -> Tensor:
        """What stands behind the last norm, (B, T, d); what lies behind the `lengths`, integers (B,), is padding."""
        if cache is not None and documents is not None:
            raise ValueError("a cache continues one document, so none can be kept apart")
        before = 0 if cache is None else cache.length
        length = before + tokens.shape[1]
        if before and self.chooses_from_sequences:
            raise UserError("experts that choose tokens (moe.router) must see a text whole: read it without a cache")
        if length > self.context_length:
            raise UserError(f"input of {length} tokens is longer than the context length {self.context_length}")
        x = self.embed(tokens)  # (B, T, d)
        if self.embed_scale is not None:
            x = self.embed_scale(x)
        cos, sin = self.cos[before:length], self.sin[before:length]
        mask = None if documents is None else document_mask(documents)
        real = None if lengths is None else torch.arange(length, device=tokens.device) < lengths[:, None]
        routed = (real,) if self.moe.experts else ()
        routings = []
        for index, block in enumerate(self.blocks):
            out = block(x, cos, sin, None if cache is None else cache.layers[index], mask, *routed)
            if self.moe.experts:
                x, routing = out
                routings.append(routing)
            else:
                x = out
        self.routing = Routing(*(torch.stack(parts) for parts in zip(*routings, strict=True))) if routings else None
        return self.norm(x)

    @torch.no_grad()
    def follow_load(self, load: Tensor) -> None:
        """Move the routers' biases after an optimiser step's load (blocks, experts) over all processes."""
        routers = (module for module in self.modules() if isinstance(module, Router))
        for router, counts in zip(routers, load, strict=True):
            router.follow(counts, self.moe.balance_bias_rate)

    def parameter_count(self, active: bool = False, embeddings: bool = True) -> int:
        """Trainable parameters in closed form, without a head.

        Args:
            active: only those that a token meets: of the experts, the chosen ones.
            embeddings: count the token embedding.
        """
        config = self.config
        attention = config.dim * (config.num_heads + 2 * config.kv_heads) * config.head_dim + config.dim**2
        attention += gate_parameter_count(config.dim, config.dim, self.ffn)
        norm = norm_parameter_count(config.dim, self.ffn)
        norms = 2 * norm + (2 * config.head_dim if config.qk_norm else 0)
        if self.moe.experts:
            mlp = moe_parameter_count(config.dim, self.ffn, self.moe, active)
        else:
            mlp = parameter_count(config.dim, self._hidden_dim, self.ffn)
        table = self.embed.num_embeddings * config.dim
        last = norm + (0 if self.embed_scale is None else 1)
        return config.depth * (attention + norms + mlp) + last + (table if embeddings else 0)

    @property
    def _hidden_dim(self) -> int:
        return matched_hidden_dim(
            self.config.dim, self.ffn, round(self.ffn.hidden_ratio * self.config.dim), self.ffn.match
        )

    def flops_per_token(self) -> int:
        """Matrix-product FLOPs of one forward pass for one token at full context, without a head; causal
        attention counted by half."""
        config = self.config
        qkv = 2 * config.dim * (config.num_heads + 2 * config.kv_heads) * config.head_dim
        projection = 2 * config.dim * config.dim + gate_flops_per_token(config.dim, config.dim, self.ffn)
        norm = norm_flops_per_token(config.dim, self.ffn)
        attention = 2 * 2 * config.dim * self.context_length // 2
        if self.moe.experts:
            mlp = moe_flops_per_token(config.dim, self.ffn, self.moe)
        else:
            mlp = flops_per_token(config.dim, self._hidden_dim, self.ffn)
        blocks = config.depth * (qkv + projection + attention + mlp + 2 * norm)
        return blocks + norm


def gpt_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices normal with standard deviation fan-in^-1/2, those into the residual stream zero, embeddings 0.02."""
    if isinstance(module, nn.Embedding):
        parameter.normal_(std=EMBEDDING_STD, generator=generator)
    elif isinstance(module, nn.Linear | StackedLinear):
        if name.endswith(("attn.proj.weight", "down_proj.weight", "bias")):
            parameter.zero_()
        elif name != "head.weight":
            parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.normal_(std=0.02, generator=generator)
