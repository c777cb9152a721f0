"""A GPT's trunk that judges whole texts: in place of the output matrix a small head reads one vector a sequence. [O]

    logits = head(norm(x)[last]),  last: the last real token of the sequence

Attention stays causal, as it was pre-trained, so the last token is the only one that has seen all others; a mean would
weigh in what has seen next to nothing. Every text ends in the token between documents (data/labelled_text.py), which
pre-training has met, so the head always reads the same token (Radford et al., "Improving language understanding by
generative pre-training", 2018). No token is predicted, so expert choice is allowed: its experts may compare all tokens
of the sequence that is judged.

Padding stands behind the text, where no earlier token sees it, and takes no expert's place (moe.py): what comes out
does not depend on it, nor on the other sequences of the batch, but for a capacity of token choice, in training.
"""

import torch
from torch import Tensor, nn

from ..feedforward import FFNConfig
from ..moe import MoEConfig
from .classifier import HEAD_STD
from .init import initialize
from .trunk import GPTConfig, Trunk, gpt_rule

HEAD = "head."  # where the names of its parameters begin


class SequenceClassifier(Trunk):
    """Tokens int64 (B, T) and lengths (B,) -> (B, outputs). Blocks and embedding have a GPT's names.

    Args:
        config: the size; tie_embeddings has no meaning here.
        ffn: the feed-forward layer of every block.
        vocab_size: number of token ids.
        context_length: longest input in tokens.
        outputs: classes, or 1 for a number.
        seed: initial weights are a function of (seed, parameter name).
        moe: experts in place of every block's feed-forward layer.
    """

    def __init__(
        self,
        config: GPTConfig,
        ffn: FFNConfig,
        vocab_size: int,
        context_length: int,
        outputs: int,
        seed: int = 0,
        moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(config, ffn, vocab_size, context_length, moe)
        self.head = nn.Linear(config.dim, outputs)
        initialize(self, seed, judge_rule)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, outputs) of tokens (B, T), of which the first `lengths`, integers (B,), are real."""
        return self.head(self._last(tokens, lengths))

    def features(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """What the head reads: (B, d)."""
        return self._last(tokens, lengths)

    def _last(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `features`, which `forward` must not call: behind either the weights of a sharded net are given back."""
        x = self._features(tokens, None, None, lengths)
        return x[torch.arange(len(x), device=x.device), lengths - 1]

    def layer_rates(self, decay: float) -> dict[str, float]:
        """Learning rate of each parameter in units of the head's: `decay` once for every layer that lies above it.

        Layers: embedding; each block, the last one with a norm behind it; head, as in ImageClassifier.layer_rates.
        """
        depth = self.config.depth

        def above(name: str) -> int:
            if name.startswith(HEAD):
                return 0
            if name.startswith("embed"):  # its scale, too, where norms are point-wise
                return depth + 1
            return depth - int(name.split(".")[1]) if name.startswith("blocks.") else 1

        return {name: decay ** above(name) for name, _ in self.named_parameters()}

    def parameter_count(self, active: bool = False, embeddings: bool = True) -> int:
        """Trainable parameters in closed form, see Trunk.parameter_count."""
        return super().parameter_count(active, embeddings) + self.head.out_features * (self.config.dim + 1)


def judge_rule(module: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """gpt_rule, and a head near zero, as fine-tuned encoders have it (classifier.py): its first gradients disturb
    little in the layers under it."""
    if name == f"{HEAD}weight":
        parameter.normal_(std=HEAD_STD, generator=generator)
    else:
        gpt_rule(module, name, parameter, generator)
