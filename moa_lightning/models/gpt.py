"""A causal language model: the trunk of trunk.py and an output matrix."""

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..feedforward import FFNConfig
from ..losses.language import chunked_losses, fused_losses
from ..moe import MoEConfig
from ..sampling import Sampling, continuation
from .init import initialize
from .trunk import Cache, GPTConfig, Trunk, gpt_rule


class GPT(Trunk):
    """Tokens int64 (B, T) -> logits (B, T, vocab_size).

    Args:
        config: the size.
        ffn: the feed-forward layer of every block.
        vocab_size: number of token ids.
        context_length: longest input in tokens.
        seed: initial weights are a function of (seed, parameter name).
        moe: experts in place of every block's feed-forward layer.

    Raises:
        UserError: expert choice, which looks at later tokens, without moe.see_later_tokens.
    """

    def __init__(
        self,
        config: GPTConfig,
        ffn: FFNConfig,
        vocab_size: int,
        context_length: int,
        seed: int = 0,
        moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
    ) -> None:
        if moe.chooses_from_sequences and not moe.see_later_tokens:
            raise UserError(
                "moe.router 'expert_choice' lets outputs depend on later tokens, which a causal model must not see; "
                "choose 'token_choice', or set moe.see_later_tokens to true for an experiment that knows it"
            )
        super().__init__(config, ffn, vocab_size, context_length, moe)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        initialize(self, seed, gpt_rule)

    def forward(
        self,
        tokens: Tensor,
        cache: Cache | None = None,
        documents: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Tokens int64 (B, T) -> logits (B, T, vocab_size).

        Args:
            cache: of a text already read, which the tokens continue.
            documents: the number of each token's document, integers (B, T), to keep documents apart; not with a cache.
            last: compute the logits of so many tokens at the end only; None: of all.
        """
        features = self._features(tokens, cache, documents)
        return self.head(features if last is None else features[:, -last:])

    def losses(
        self, tokens: Tensor, targets: Tensor, chunk: int, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of tokens int64 (B, T), and documents as in forward: see losses.language.chunked_losses."""
        return chunked_losses(self._features(tokens, None, documents), self.head, targets, chunk)

    def fused_losses(
        self, tokens: Tensor, targets: Tensor, z_loss_weight: float, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of tokens int64 (B, T), and documents as in forward: see losses.language.fused_losses."""
        return fused_losses(self._features(tokens, None, documents), self.head.weight, targets, z_loss_weight)

    def new_cache(self) -> Cache | None:
        """An empty one, with room for the context length; None where a further token changes what others get, so that
        a text must be read again whole (expert choice)."""
        return None if self.chooses_from_sequences else Cache(self.config.depth, self.context_length)

    def parameter_count(self, active: bool = False, embeddings: bool = True) -> int:
        """See Trunk.parameter_count; an output matrix of its own counts as an embedding."""
        own = embeddings and not self.config.tie_embeddings
        return super().parameter_count(active, embeddings) + (self.head.weight.numel() if own else 0)

    def flops_per_token(self) -> int:
        """Matrix-product FLOPs of one forward pass for one token at full context; causal attention counted by half."""
        return super().flops_per_token() + 2 * self.head.weight.numel()

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        generator: torch.Generator,
        sampling: Sampling = Sampling(temperature=0.8),  # noqa: B008 - frozen
        ids: int | None = None,
    ) -> Tensor:
        """Sample a continuation: tokens (B, T) -> (B, T + new_tokens); see sampling.continuation."""
        return torch.cat([tokens, *continuation(self, tokens, new_tokens, generator, sampling, ids)], dim=1)
