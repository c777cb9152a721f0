"""What the routers of a mixture of experts do while they train.

The net keeps the statistics of its last forward pass on its device (moe.Routing); here they are brought over in one
transfer on logging steps. They are those of the first process's tokens in the last micro-batch of the step.
"""

from typing import Any

import lightning as L
import torch

from ..moe import Routing
from .common import is_logging_step, parts_at_work, tensorboard_step, tensorboard_writer, write_scalars


class RoutingTelemetry(L.Callback):
    """Logs, for each block with experts, on logging steps: routing/<block>/load/<expert>, the expert's share of the
    assignments in units of an even share (1 everywhere is balanced); entropy, of the router over log E (1: undecided);
    dropped, the share of assignments without a place (expert choice: of tokens that no expert took). Does nothing for
    a net without experts; of a joint task's nets, one may have them."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_logging_step(trainer):
            return
        writer = tensorboard_writer(trainer)
        for task in parts_at_work(pl_module, batch).values() or (pl_module,):
            routing = getattr(getattr(task, "net", None), "routing", None)
            if writer is not None and isinstance(routing, Routing):
                write_scalars(writer, scalars(routing), tensorboard_step(trainer))


def scalars(routing: Routing) -> dict[str, float]:
    """The numbers by tag; each tensor of `routing` has the blocks on its first axis."""
    load = routing.load.double()
    load = load * load.shape[-1] / load.sum(-1, keepdim=True)
    others = torch.stack([routing.entropy.detach().double(), routing.dropped.double()], dim=-1)
    values = {}
    for block, row in enumerate(torch.cat([load, others], dim=-1).tolist()):
        for expert, share in enumerate(row[:-2]):
            values[f"routing/block{block:02d}/load/expert{expert:02d}"] = share
        values[f"routing/block{block:02d}/entropy"], values[f"routing/block{block:02d}/dropped"] = row[-2:]
    return values
