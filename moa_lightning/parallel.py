"""How a net is spread over devices and compiled.

`fsdp` is FSDP2 (`fully_shard`) through Lightning's ModelParallelStrategy with the data-parallel size set to the world:
Lightning's own default shards nothing and lets all ranks read the same data. Nets are built without their matrices,
sharded, and then given their initial values, which depend on (seed, name) only: see models/init.py.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .checkpoint_reading import load_into, split_tensors
from .checkpoints import RunCheckpointIO
from .errors import UserError
from .feedforward import FeedForward
from .kernels import compiler_works
from .mixing import MixCoefficients
from .moe import Router

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten._grouped_mm)
ATTENTION = "aten::_scaled_dot_product"  # one operation for each of torch's implementations


class FSDPStrategy(ModelParallelStrategy):
    """Parameters, gradients and optimiser state sharded over devices (FSDP2).

    Args:
        replicas: copies of the net, each sharded over its part of the devices (hybrid sharding); "nodes" makes one
            copy a node, so that parameters travel inside nodes and only gradients between them.
        low_precision_parameters: blocks gather their parameters in bfloat16 and reduce gradients in float32; the
            coefficients of mixes and the routers stay in float32. For precision bf16-mixed: half the traffic.
        save_distributed_checkpoint: write one file a rank (loadable by any world size) instead of one merged file.

    Raises:
        UserError: the devices do not make so many equal parts.
    """

    def __init__(
        self,
        replicas: int | Literal["nodes"] = 1,
        low_precision_parameters: bool = False,
        save_distributed_checkpoint: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_parallel_size="auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            **kwargs,
        )
        self.replicas, self.low_precision_parameters = replicas, low_precision_parameters
        self._checkpoint_group: dist.ProcessGroup | None = None

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self.shard_mesh = self._mesh()
        if self._checkpoint_io is None:
            self.checkpoint_io = RunCheckpointIO()

    def _mesh(self) -> DeviceMesh:
        replicas = self.num_nodes if self.replicas == "nodes" else self.replicas
        if replicas < 1 or self.world_size % replicas:
            raise UserError(f"replicas is {replicas}, which does not divide the {self.world_size} devices")
        if replicas == 1:
            return self.device_mesh["data_parallel"]
        sizes = (replicas, self.world_size // replicas)
        return init_device_mesh(self.root_device.type, sizes, mesh_dim_names=("replicas", "shards"))

    def shard(self, net: nn.Module, methods: tuple[str, ...]) -> None:
        """Shard a net over the devices, see `shard`."""
        shard(net, self.shard_mesh, methods, self.low_precision_parameters)

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
        if self._checkpoint_group is None:
            self._checkpoint_group = dist.new_group(backend="gloo")  # type: ignore[assignment]
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
            # not strict: a parameter that has had no gradient (DINO's last layer, at first) has no state
            set_optimizer_state_dict(self.model, optimizer, state, options=StateDictOptions(strict=False))
        return checkpoint

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()


StrategyRegistry.register("fsdp2", FSDPStrategy, description="FSDP2 over all devices")


def shard(
    net: nn.Module, mesh: DeviceMesh, methods: tuple[str, ...] = (), low_precision_parameters: bool = False
) -> None:
    """Shard a net in place over a mesh: every transformer block, then the rest.

    Args:
        net: blocks are the members of its ModuleLists and Sequentials named `blocks`.
        mesh: one-dimensional (shards), or two-dimensional (replicas, shards).
        methods: methods of `net` besides forward that compute with its parameters.
        low_precision_parameters: see FSDPStrategy.
    """
    policy = MixedPrecisionPolicy()
    if low_precision_parameters:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks, whole = transformer_blocks(net), replicated_parameters(net)
    for parameter in whole:  # the others are moved where they are sharded
        parameter.data = parameter.data.to(mesh.device_type)
    for unit in [*shared_layers(blocks), *blocks]:  # a layer of several blocks is gathered by itself
        exact: list[nn.Module] = [
            module
            for module in unit.modules()
            if isinstance(module, MixCoefficients | Router)
            and not isinstance(module, FSDPModule)
            and not whole.intersection(module.parameters(recurse=False))
        ]
        if low_precision_parameters and exact:  # bfloat16 would round coefficients and logits before they are used
            fully_shard(exact, mesh=mesh)
        fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(net, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for method in methods:
        register_fsdp_forward_method(net, method)


def transformer_blocks(net: nn.Module) -> list[nn.Module]:
    """The members of the ModuleLists and Sequentials named `blocks`."""
    stacks = [module for name, module in net.named_modules() if name.rpartition(".")[2] == "blocks"]
    return [block for stack in stacks for block in stack.children()]


def shared_layers(blocks: list[nn.Module]) -> list[nn.Module]:
    """Feed-forward layers that stand in more than one block."""
    places = Counter(layer for block in blocks for layer in block.modules() if isinstance(layer, FeedForward))
    return [layer for layer, count in places.items() if count > 1]


def replicated_parameters(net: nn.Module) -> set[nn.Parameter]:
    """Parameters that no part of the devices can own: all of the mixes, where two mixes share one.

    FSDP2 shards what lies in one unit. Mixes are small, and all of them stay whole, as torch's optimisers take a group
    of either kind. Their gradients are averaged by `average_gradients`.
    """
    mixes = [module for module in net.modules() if isinstance(module, MixCoefficients)]
    parameters = [parameter for mix in mixes for parameter in mix.parameters(recurse=False)]
    return set(parameters) if len(set(parameters)) < len(parameters) else set()


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that every process holds whole; called by all processes in the same order."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def checkpoint_blocks(net: nn.Module, selective: bool = False) -> None:
    """Have every transformer block recomputed in the backward pass, in place; names of parameters stay.

    Args:
        selective: keep what matrix products and attention made and recompute the rest (norms, rotations, activations),
            which costs little time to make and much memory to keep.
    """
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for block in transformer_blocks(net):
        block.forward = partial(checkpoint, block.forward, **how)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of selective checkpointing."""
    keep = operation.overloadpacket in PRODUCTS or operation.name().startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(net: nn.Module) -> None:
    """Compile every transformer block in place; where this machine cannot compile, say so and stay eager."""
    if not compiler_works():
        return
    for block in transformer_blocks(net):
        block.compile()
