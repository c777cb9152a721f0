"""A GPT: RMSNorm, rotary positions, query-key norm, grouped-query attention, and the feed-forward layer as a part.

    x = embed(tokens);  x += attn(norm1(x)), x += mlp(norm2(x)) per block;  logits = head(norm(x))

Pre-norm decoder without biases, after what recent open trainers agree on: rotary positions (Su et al., arXiv
2104.09864), RMSNorm (Zhang and Sennrich, arXiv 1910.07467), RMS-normalised queries and keys (Henry et al., arXiv
2010.04245), grouped-query attention (Ainslie et al., arXiv 2305.13245). The projections into the residual stream start
at zero, so each block starts as the identity.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FeedForward, FFNConfig
from .init import initialize


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
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(f"gpt.num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads


def rotary_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, float32 (length, head_dim / 2) each."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + head_dim/2) of x (B, heads, T, head_dim) by their angles."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention, x (B, T, d) -> (B, T, d)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = config.head_dim, config.num_heads, config.kv_heads
        self.qkv = nn.Linear(config.dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = (
            self.qkv(x)
            .view(batch, length, -1, self.head_dim)
            .transpose(1, 2)
            .split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        )  # each (B, heads, T, head_dim)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads != self.heads)
        return self.proj(y.transpose(1, 2).reshape(batch, length, dim))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream; x (B, T, d) -> (B, T, d)."""

    def __init__(self, config: GPTConfig, ffn: FFNConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.dim)
        self.mlp = FeedForward(config.dim, ffn)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A causal language model: tokens int64 (B, T) -> logits (B, T, vocab_size).

    Args:
        config: the size.
        ffn: the feed-forward layer of every block.
        vocab_size: number of token ids.
        context_length: longest input in tokens.
        seed: initial weights are a function of (seed, parameter name).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, ffn: FFNConfig, vocab_size: int, context_length: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.context_length = config, context_length
        self.embed = nn.Embedding(vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, ffn) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        cos, sin = rotary_table(context_length, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        initialize(self, seed, gpt_rule)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        if length > self.context_length:
            raise UserError(f"input of {length} tokens is longer than the context length {self.context_length}")
        x = self.embed(tokens)  # (B, T, d)
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def flops_per_token(self) -> int:
        """Matrix-product FLOPs of one forward pass for one token at full context; causal attention counted by half."""
        config = self.config
        qkv = 2 * config.dim * (config.num_heads + 2 * config.kv_heads) * config.head_dim
        projection = 2 * config.dim * config.dim
        attention = 2 * 2 * config.dim * self.context_length // 2
        mlp = sum(m.flops_per_token() for m in self.modules() if isinstance(m, FeedForward))
        return config.depth * (qkv + projection + attention) + mlp + 2 * self.head.weight.numel()

    @torch.no_grad()
    def generate(self, tokens: Tensor, new_tokens: int, generator: torch.Generator, temperature: float = 0.8) -> Tensor:
        """Sample a continuation: tokens (B, T) -> (B, T + new_tokens). Recomputes the window for each token."""
        for _ in range(new_tokens):
            logits = self(tokens[:, -self.context_length :])[:, -1].float() / temperature
            choice = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)
            tokens = torch.cat([tokens, choice.to(tokens.device)], dim=1)
        return tokens


def gpt_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Matrices normal with standard deviation fan-in^-1/2, those into the residual stream zero, embeddings 0.02."""
    if isinstance(module, nn.Embedding):
        parameter.normal_(std=0.02, generator=generator)
    elif isinstance(module, nn.Linear):
        if name.endswith(("attn.proj.weight", "down_proj.weight")) or parameter.dim() == 1:
            parameter.zero_()
        elif name != "head.weight":
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.normal_(std=0.02, generator=generator)
