"""How a net is spread over devices and compiled.

`fsdp` is FSDP2 (`fully_shard`) through Lightning's ModelParallelStrategy with the data-parallel size set to the world:
Lightning's own default shards nothing and lets all ranks read the same data. Nets are built with their full initial
weights, which depend on (seed, name) only, and sharded after that, so any world size starts from the same numbers.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from .checkpoints import RunCheckpointIO, load_into, split_tensors
from .errors import UserError

log = logging.getLogger(__name__)


class FSDPStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser state sharded over all devices (FSDP2).

    Args:
        save_distributed_checkpoint: write one file a rank (loadable by any world size) instead of one merged file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **kwargs: Any) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self._checkpoint_group: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self._checkpoint_group = dist.new_group(backend="gloo")  # type: ignore[assignment]
        if self._checkpoint_io is None:
            self.checkpoint_io = RunCheckpointIO()

    @property
    def run_checkpoint_io(self) -> RunCheckpointIO:
        """The checkpoint plugin, which must be ours to write shards."""
        if not isinstance(self.checkpoint_io, RunCheckpointIO):
            raise UserError(f"{type(self.checkpoint_io).__name__} cannot write shards; take it out of trainer.plugins")
        return self.checkpoint_io

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a folder of shards, or one merged file. Called by all processes."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        assert self._checkpoint_group is not None
        self.run_checkpoint_io.save_shards(checkpoint, Path(self.broadcast(filepath)), self._checkpoint_group)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load weights and optimiser states from shards of any number of processes, or from one file."""
        path = Path(self.broadcast(checkpoint_path))
        self.run_checkpoint_io.queue.wait()
        assert self.model is not None
        states = [get_optimizer_state_dict(self.model, optimizer) for optimizer in self.optimizers]
        own, groups = split_tensors({"state_dict": get_model_state_dict(self.model), "optimizer_states": states})
        checkpoint = load_into(own, groups["optimizer_states"], path)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"))
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states"), strict=True):
            set_optimizer_state_dict(self.model, optimizer, state)
        return checkpoint

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register("fsdp2", FSDPStrategy, description="FSDP2 over all devices")


def shard(net: nn.Module, mesh: DeviceMesh, methods: tuple[str, ...] = ()) -> None:
    """Shard a net in place over a one-dimensional mesh: every transformer block, then the rest.

    Args:
        net: blocks are the members of its ModuleLists and Sequentials named `blocks`.
        mesh: the data-parallel mesh.
        methods: methods of `net` besides forward that compute with its parameters.
    """
    for name, module in net.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(net, method)


def compile_blocks(net: nn.Module) -> None:
    """Compile every transformer block in place; where this machine cannot compile, say so and stay eager."""
    if not _compiler_works():
        return
    for name, module in net.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                block.compile()


def _compiler_works() -> bool:
    """A missing C++ compiler or Triton shows only at the first compiled call, so make one."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8))
    except Exception as error:
        log.warning("torch.compile does not work here (%s); running without it", str(error).strip().splitlines()[0])
        return False
    return True
