"""What the tasks of a GPT share: its settings, and what its routers add to the loss."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.evaluation.token_classes import TokenClasses, text_classes
from moa_lightning.models import GPTConfig
from moa_lightning.moe import MoEConfig, balance_loss

from .base import Task, as_config

TOKENIZER_KEY = "tokenizer_sha256"  # in a checkpoint


def check_tokenizer(
    checkpoint: Mapping[str, Any], tokenizer: Any, name: str, trained: str = "the checkpoint was"
) -> None:
    """UserError where a checkpoint is of a net that was trained with another tokenizer."""
    if checkpoint.get(TOKENIZER_KEY, tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{name} ({tokenizer.name}) is not the one that {trained} trained with; give that one")


class GPTTask(Task):
    """Base of LanguageModeling and SequenceClassification.

    Args:
        gpt: the size of the model.
        ffn: the feed-forward layer of every block.
        moe: experts in place of every block's feed-forward layer.
        options: `Task`'s.
    """

    def __init__(self, gpt: GPTConfig, ffn: FFNConfig, moe: MoEConfig, *options: Any) -> None:
        super().__init__(*options)
        self.gpt, self.ffn = as_config(GPTConfig, gpt), as_config(FFNConfig, ffn)
        self.moe = as_config(MoEConfig, moe)
        self._load: Tensor | None = None  # of the experts since the last optimiser step, over all processes

    def with_router_loss(self, loss: Tensor) -> Tensor:
        """A loss and the routers' losses of its forward pass with their weights, each a mean over the blocks; keeps the
        load for the biases."""
        if not self.moe.experts:
            return loss
        routing, moe = self.net.routing, self.moe
        z_loss = routing.z_loss.mean()
        self.log("train/router_z_loss", z_loss.detach(), sync_dist=True)
        total = moe.z_loss_weight * z_loss
        if moe.balances_by_loss or moe.balances_by_bias:
            load = self.trainer.strategy.reduce(routing.load.clone(), reduce_op="sum")  # (blocks, experts)
            balance = balance_loss(load, routing.probability).mean()
            self.log("train/balance_loss", balance.detach(), sync_dist=True)
            if moe.balances_by_loss:
                total = total + moe.balance_loss_weight * balance
            self._load = load if self._load is None else self._load + load
        return loss + total

    def after_step(self, before: float | None) -> None:
        if self.moe.balances_by_bias and self._load is not None:
            self.net.follow_load(torch.where(self.step_skipped > 0, 0, self._load))  # an even load moves nothing
        self._load = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        tokenizer = getattr(self.data, "tokenizer", None)
        if tokenizer is not None:
            checkpoint[TOKENIZER_KEY] = tokenizer.sha256

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_tokenizer(checkpoint, "the checkpoint was")

    def _check_tokenizer(self, checkpoint: Mapping[str, Any], trained: str) -> None:
        tokenizer = None if self._trainer is None else getattr(self.data, "tokenizer", None)
        if tokenizer is not None:
            check_tokenizer(checkpoint, tokenizer, "the data's tokenizer", trained)

    def check_start(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        self._check_tokenizer(checkpoint, f"the weights of '{path}' were")
        super().check_start(checkpoint, path)

    def shapeless(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Experts may choose tokens where tokens chose experts, and with another capacity; rotary angles may be
        stretched for a longer context."""
        gpt, moe = options.get("gpt") or {}, options.get("moe") or {}
        heads = gpt.get("num_heads")
        chosen = moe.get("top_k") if moe.get("experts") and moe.get("router") == "token_choice" else None
        return {
            "gpt.num_heads": heads,
            "gpt.num_kv_heads": gpt.get("num_kv_heads") or heads,
            "moe.top_k": chosen,
        }

    def trunk(self) -> nn.Module:
        return self.net

    def tokens_per_batch(self, batch: dict[str, Any]) -> int:
        return batch["tokens"].numel()

    def active_parameters(self) -> int:
        return self.net.parameter_count(active=True)

    def token_classes(self, batch: dict[str, Any]) -> TokenClasses:
        decode = self.data.decode
        return text_classes([[decode([token]) for token in row] for row in batch["tokens"].tolist()])
