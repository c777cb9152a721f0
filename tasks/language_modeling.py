"""Next-token prediction with a GPT; held-out text is judged by loss, perplexity and bits per byte."""

import math
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.evaluation import TextMetrics
from moa_lightning.losses.language import IGNORED, runs_fused
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.optim import OptimizerConfig

from .base import Recompute
from .gpt import GPTTask

SAMPLE_TOKENS = 200


class LanguageModeling(GPTTask):
    """A GPT trained to predict the next token.

    Args:
        gpt: the size of the model.
        ffn: the feed-forward layer of every block.
        moe: experts in place of every block's feed-forward layer; moe.experts 0: none.
        optimizer: AdamW or Muon, and the schedule.
        vocab_size: number of token ids, which may be more than the data's (a multiple of 64 is faster on a GPU); None:
            the data's.
        context_length: longest input in tokens; None: the data's.
        seed: of the initial weights; None: the run's seed.
        compile: compile each transformer block.
        loss_chunk: tokens whose logits exist at a time, which saves memory where the vocabulary is large; None: all.
        fused_loss: on a GPU output matrix and loss by the fused kernels of the package liger_kernel, which chooses the
            chunks; elsewhere loss_chunk holds.
        z_loss_weight: of the mean squared logarithm of the softmax's normaliser (1e-4 in PaLM).
        activation_checkpointing: recompute each block in the backward pass instead of storing its activations;
            "selective" keeps its matrix products and attention and recomputes the rest.
        weights_from: a run's folder or a checkpoint whose weights the net starts with; what LA or MoA adds to a fixed
            activation begins at the identity start, where the net computes what it computed there.
    """

    forward_methods = ("generate", "losses", "fused_losses")

    def __init__(
        self,
        gpt: GPTConfig = GPTConfig(),  # noqa: B008 - frozen
        ffn: FFNConfig = FFNConfig(),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        vocab_size: int | None = None,
        context_length: int | None = None,
        seed: int | None = None,
        compile: bool = False,
        activation_checkpointing: Recompute = False,
        moe: MoEConfig = MoEConfig(),  # noqa: B008
        loss_chunk: int | None = None,
        fused_loss: bool = False,
        z_loss_weight: float = 0.0,
        weights_from: str | None = None,
    ) -> None:
        super().__init__(gpt, ffn, moe, optimizer, seed, compile, activation_checkpointing, weights_from)
        self.keep_hyperparameters(locals(), gpt=self.gpt, ffn=self.ffn, moe=self.moe, optimizer=self.optimizer_config)
        if (loss_chunk is not None and loss_chunk < 1) or not 0 <= z_loss_weight < math.inf:
            raise UserError(
                f"model.loss_chunk is {loss_chunk} and model.z_loss_weight {z_loss_weight}; give at least 1 token (or "
                "null), and a finite weight of at least 0"
            )
        if fused_loss and find_spec("liger_kernel") is None:
            raise UserError("model.fused_loss needs the package liger_kernel: pip install 'moa-lightning[fused]'")
        self.loss_chunk, self.fused_loss, self.z_loss_weight = loss_chunk, fused_loss, z_loss_weight
        self.val_metrics, self.test_metrics = TextMetrics(), TextMetrics()
        self._by_source: dict[int, TextMetrics] = {}  # of a mixture's sources, while it is evaluated

    def build(self, seed: int) -> nn.Module:
        sizes = self.from_data("vocab_size"), self.from_data("context_length")
        return GPT(self.gpt, self.ffn, *sizes, seed, self.moe)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens int64 (B, T) -> logits (B, T, vocab_size)."""
        return self.net(tokens)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        counted = (batch["targets"] >= 0).sum()
        nll, z_loss = (values.sum() / counted for values in self._losses(batch))
        self.log("train/loss", nll.detach(), sync_dist=True)
        if self.z_loss_weight:
            self.log("train/z_loss", z_loss.detach() / self.z_loss_weight, sync_dist=True)
        return self.with_router_loss(nll + z_loss)

    def _losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood in nats and weighted z-loss per target, float32 (B, T), to be added before a gradient
        is taken; 0 where the target does not count."""
        tokens, targets, documents = batch["tokens"], batch["targets"], batch.get("documents")
        if self.fused_loss and runs_fused(tokens.device):
            return self.net.fused_losses(tokens, targets, self.z_loss_weight, documents)
        if self.loss_chunk is not None:
            nll, normalizer = self.net.losses(tokens, targets, self.loss_chunk, documents)
        else:
            logits = self.net(tokens, documents=documents).float()
            nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
            if self.z_loss_weight:
                normalizer = logits.logsumexp(-1).masked_fill(targets == IGNORED, 0.0)
        if not self.z_loss_weight:
            return nll, torch.zeros_like(nll)
        return nll, self.z_loss_weight * normalizer.square()

    def mix_forward(self, batch: dict[str, Any]) -> None:
        self.net(batch["tokens"], documents=batch.get("documents"))

    def nll(self, batch: dict[str, Any]) -> Tensor:
        """Negative log-likelihood of each target in nats, float32 (B, T); 0 where it does not count."""
        return self._losses(batch)[0]

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self._evaluate("val", self.val_metrics, batch)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self._evaluate("test", self.test_metrics, batch)

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        """The mean loss in nats of each sample, with its id."""
        counted = (batch["targets"] >= 0).sum(1)
        return {"id": batch["id"], "loss": self.nll(batch).sum(1) / counted}

    def _evaluate(self, split: str, metrics: TextMetrics, batch: dict[str, Any]) -> None:
        data, targets = self.data, batch["targets"]
        nll = self.nll(batch)
        metrics.update(nll, targets, data.token_bytes)
        if "source" not in batch:
            return
        if not self._by_source:
            self._by_source = {number: TextMetrics().to(self.device) for number in data.source_names(split)}
        for number, own in self._by_source.items():  # all of them on every rank, as they are added over processes
            others = (batch["source"] != number)[:, None]
            own.update(nll, targets.masked_fill(others, IGNORED), data.token_bytes)

    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_metrics)

    def _report(self, split: str, metrics: TextMetrics) -> None:
        values = metrics.compute()  # sums over all processes: every rank logs the same
        metrics.reset()
        for number, own in self._by_source.items():
            name = self.data.source_names(split)[number]
            loss = own.compute()["loss"]
            if not loss.isnan():  # a short validation may not reach a source
                values[f"loss_{name}"] = loss
        self._by_source = {}
        for name, value in values.items():
            self.log(f"{split}/{name}", value.to(self.device), prog_bar=name == "loss", sync_dist=True)

    def flops_per_sample(self) -> float:
        return 3.0 * self.net.flops_per_token() * self.net.context_length

    @torch.no_grad()
    def texts(self) -> dict[str, str]:
        """A continuation of a line break, or of what a vocabulary without one has, sampled at temperature 0.8 from the
        same seed every time."""
        data = self.data
        prompt = torch.tensor([_beginning(data)], device=self.device)
        generator = torch.Generator().manual_seed(0)
        with self.trainer.precision_plugin.forward_context():
            tokens = self.net.generate(prompt, SAMPLE_TOKENS, generator, ids=data.vocab_size)
        return {"sample": data.decode(tokens[0, prompt.shape[1] :].tolist())}


def _beginning(data: Any) -> list[int]:
    """Tokens of a line break, else of a space, else what stands between two texts."""
    for text in ("\n", " "):
        with suppress(UserError):  # nanoGPT's text8 has letters and spaces only
            if tokens := data.encode(text):
                return tokens
    return [data.tokenizer.separator]
