"""Two processes that really run a fit, and say what each of them held and sent.

`python -m tests.planning.group FOLDER` is what each process runs; environment variables say which one it is.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.tensor import DTensor

from moa_lightning.parallel import FSDPStrategy
from tests.planning.nets import BATCH, TASKS, Sizes, trainer
from tests.runs.fits import make_task
from tests.runs.group import start_group


def run_group(folder: Path) -> dict[str, dict[str, int]]:
    """Run in two processes; returns what the first one saw, by strategy and task."""
    start_group(["tests.planning.group", str(folder)], folder)
    return json.loads((folder / "seen.json").read_text())


class Look(L.Callback):
    """What this process holds after the last step."""

    def __init__(self, tracker: MemTracker) -> None:
        self.tracker = tracker
        self.seen: dict[str, int] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.tracker.reset_mod_stats()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.seen["gradients"] = held(p.grad for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        states = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        self.seen |= {"weights": held([*pl_module.parameters(), *pl_module.buffers()]), "optimizer": held(states)}


def held(tensors: Any) -> int:
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


class Reference(MemTracker):
    """torch's own tracker, without its hooks, which parameters without a gradient refuse."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def seen(task: str, strategy: Any) -> dict[str, int]:
    with Reference() as tracker:
        look = Look(tracker)
        fit = trainer(devices=2, strategy=strategy, max_steps=2, callbacks=[look])
        fit.fit(make_task(task, "gelu"), datamodule=Sizes(task, BATCH // 2, steps=2))
    return {**look.seen, "peak": tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {}
    for task in TASKS:
        results[f"fsdp2 {task}"] = seen(task, FSDPStrategy())
        results[f"ddp {task}"] = seen(task, "ddp")
    results["copies language"] = seen("language", FSDPStrategy(replicas=2))
    if dist.get_rank() == 0:
        (folder / "seen.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
