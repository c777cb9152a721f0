"""Executes one optimiser step of a fit on tensors without content, and measures what the real one would hold and send.

The real Trainer drives the real task: its net, loss, optimiser, clipping, precision and strategy. The net is built on
the meta device with initial values left out, so that billions of parameters take seconds and no memory; everything
after that runs under FakeTensorMode. DDP and FSDP2 run as the first of N processes of a group that sends nothing.

What differs from a real run: compilation is left out (it saves memory, how much depends on the compiler); of DDP only
its buckets are there, as its reducer is not Python; and because torch cannot differentiate fake CUDA tensors where
there is no GPU, CPU tensors stand in for them, with the norms of a GPU (see `gpu_norms`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..mixing import MixCoefficients
from ..parallel import FSDPStrategy
from .tracker import FakeMode, Tracker, local_bytes


@dataclass(frozen=True)
class Measurement:
    """One optimiser step on one device of several. Memory in bytes a device, parameters and FLOPs of the whole."""

    trained: int
    """parameters that are trained"""
    held: int
    """parameters that are not: a teacher, fixed positions"""
    mixes: int
    """trained parameters of learned mixes"""
    embeddings: int
    """trained parameters of token, patch and position embeddings"""
    active: int
    """trained parameters that a token meets: of experts the chosen ones"""
    flops_per_sample: float
    """matrix products of forward and backward, as perf/mfu counts them"""
    weights: int
    """parameters and buffers"""
    gradients: int
    buckets: int
    """DDP's copies of the gradients"""
    optimizer: int
    activations: int
    """kept by the forward pass of one micro-batch for its backward pass"""
    peak: int
    """everything, at the worst moment"""
    micro_batch_sent: dict[str, int]
    """bytes that a device sends for every micro-batch, by collective"""
    step_sent: dict[str, int]
    """bytes that it sends once an optimiser step"""

    @property
    def state(self) -> int:
        """What a device holds whatever the batch."""
        return self.weights + self.gradients + self.buckets + self.optimizer


@contextmanager
def gpu_norms() -> Iterator[None]:
    """LayerNorm and RMSNorm as on a GPU: RMSNorm in one kernel, which keeps its input and one number a row, and both in
    float32 under autocast. The CPU makes RMSNorm of several operations and leaves the dtype alone.

    The functions are replaced by name: torch switches a TorchFunctionMode off in the backward pass, where blocks are
    recomputed.
    """
    own = F.layer_norm, F.rms_norm

    def wide(*args: Any) -> tuple[Any, ...]:
        autocast = torch.is_autocast_enabled("cpu")
        return tuple(a.float() if autocast and isinstance(a, Tensor) else a for a in args)

    def layer_norm(
        x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        x, weight, bias = wide(x, weight, bias)
        return own[0](x, shape, weight, bias, eps)

    def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        x, weight = wide(x, weight)
        weight = None if weight is None else weight.to(x.dtype)
        return torch._fused_rms_norm(x, shape, weight, torch.finfo(x.dtype).eps if eps is None else eps)[0]

    F.layer_norm, F.rms_norm = layer_norm, rms_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        F.layer_norm, F.rms_norm = own


class NoValues(TorchFunctionMode):
    """Leaves out torch.nn.init, some of which looks at values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


class _Cluster(LightningEnvironment):
    """N processes of which this is the first."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self._world_size = world_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def global_rank(self) -> int:
        return 0

    def local_rank(self) -> int:
        return 0


class _Copies(DDPStrategy):
    """DDP without its reducer, whose C++ wants content; the buckets that it would hold are there."""

    def configure_ddp(self) -> None:
        assert self.model is not None
        self.buckets = [torch.empty_like(p) for p in self.model.parameters() if p.requires_grad]


class _Shards(FSDPStrategy):
    """FSDP2 whose mesh, a table of ranks, has content."""

    def setup_environment(self) -> None:
        with unset_fake_temporarily():
            super().setup_environment()


class _OneBatch:
    """A loader of one batch. Its seeds have content, as masks are drawn from them on the host."""

    def __init__(self, batch: Callable[[], dict[str, Any]]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batch = self.batch()
        with unset_fake_temporarily():
            seeds = torch.arange(len(batch["seed"]))
        yield {**batch, "seed": seeds}


class _NoData(L.LightningDataModule):
    """What a data module knows without its data, and a batch without content."""

    def __init__(self, datamodule: L.LightningDataModule, batch: Callable[[], dict[str, Any]]) -> None:
        super().__init__()
        self.datamodule, self.batch = datamodule, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.datamodule, name)

    def train_dataloader(self) -> _OneBatch:
        return _OneBatch(self.batch)

    def val_dataloader(self) -> list[Any]:
        return []


class _Observer(L.Callback):
    """Puts the fit into the state of its later steps, and looks at it."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.activations = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As after a step: moments and gradients are there, and nothing has been sent."""
        optimizer = trainer.optimizers[0]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        self.tracker.sent.clear()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.before = self.tracker.current

    def on_before_zero_grad(self, *_: Any) -> None:
        """Between the forward pass of a step's first micro-batch and its backward pass."""
        self.activations = self.tracker.current - self.before


def measure(
    new_task: Callable[[], Any],
    batch: Callable[[], dict[str, Any]],
    datamodule: L.LightningDataModule,
    strategy: str,
    devices: int,
    precision: str = "32-true",
    accumulate: int = 1,
    gpu: bool = False,
    clip: dict[str, Any] | None = None,
    **sharding: Any,
) -> Measurement:
    """Measure one optimiser step of a task.

    Args:
        new_task: makes the task, as a fit would.
        batch: makes one device's micro-batch.
        datamodule: what the task asks for open sizes; its data are not read.
        strategy: auto (one device), ddp or fsdp2.
        precision: of the Trainer.
        accumulate: micro-batches of a step. One is executed: the only one, or one of those after the first, which
            find gradients of earlier ones.
        gpu: with the norms of a GPU.
        clip: the Trainer's options of gradient clipping.
        sharding: arguments of FSDPStrategy.
    """
    tracker = Tracker()
    observer = _Observer(tracker)
    norms = gpu_norms() if gpu else nullcontext()
    task = new_task()
    with _group(devices, strategy), FakeMode(allow_non_fake_inputs=True), norms, tracker:
        _without_values(task)
        if accumulate > 1:
            task.optimizer_zero_grad = lambda *args: None
        trainer = _trainer(strategy, devices, precision, observer, clip or {}, sharding)
        trainer.fit(task, datamodule=_NoData(datamodule, batch))
        return _measurement(task, trainer, observer)


def _measurement(task: Any, trainer: L.Trainer, observer: _Observer) -> Measurement:
    net: nn.Module = task.net
    trained = [p for p in net.parameters() if p.requires_grad]
    mixes = [p for m in net.modules() if isinstance(m, MixCoefficients) for p in m.parameters(recurse=False)]
    states = [v for state in trainer.optimizers[0].state.values() for v in state.values() if isinstance(v, Tensor)]
    buckets = getattr(trainer.strategy, "buckets", [])
    copies = trainer.world_size if buckets else 1
    once = {"all-reduce": 2 * local_bytes(buckets) * (copies - 1) // copies} if copies > 1 else {}
    return Measurement(
        trained=_numel(trained),
        held=_numel(p for p in net.parameters() if not p.requires_grad),
        mixes=_numel(p for p in mixes if p.requires_grad),
        embeddings=_numel(_embeddings(net)),
        active=task.active_parameters(),
        flops_per_sample=task.flops_per_sample(),
        weights=local_bytes([*task.parameters(), *task.buffers()]),
        gradients=local_bytes(trained),
        buckets=local_bytes(buckets),
        optimizer=local_bytes(states),
        activations=observer.activations,
        peak=observer.tracker.peak,
        micro_batch_sent={kind: sent for kind, sent in observer.tracker.sent.items() if sent},
        step_sent=once,
    )


def _numel(parameters: Any) -> int:
    return sum(p.numel() for p in {id(p): p for p in parameters}.values())


def _embeddings(net: nn.Module) -> Iterator[Tensor]:
    """Trained parameters of embeddings: of tokens, of patches, positions, and learned tokens."""
    for module in net.modules():
        of_patches = type(module).__name__ == "PatchEmbed"
        for name, parameter in module.named_parameters(recurse=of_patches):
            named = name.endswith(("_token", "pos_embed"))
            if parameter.requires_grad and (of_patches or named or isinstance(module, nn.Embedding)):
                yield parameter


def _trainer(
    strategy: str, devices: int, precision: Any, observer: L.Callback, clip: dict[str, Any], sharding: dict[str, Any]
) -> L.Trainer:
    spread: str | Strategy = "auto"
    if strategy != "auto":
        spread = _Shards(**sharding) if strategy == "fsdp2" else _Copies()
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=spread,
        plugins=[] if strategy == "auto" else [_Cluster(devices)],
        precision=precision,
        max_steps=1,
        callbacks=[observer],
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **clip,
    )


@contextmanager
def _group(world_size: int, strategy: str) -> Iterator[None]:
    """A process group that sends nothing, for strategies that want one."""
    if strategy == "auto":
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _without_values(task: Any) -> None:
    """Make a task build its net without values, log nothing (a log wants numbers), and convert as fake tensors can."""
    build = task.build

    def build_without_values(seed: int) -> nn.Module:
        with unset_fake_temporarily(), torch.device("meta"), NoValues():
            net = build(seed)
        return _convert(net, without_values)

    def without_values(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    _convert(task, without_values)  # what it has besides the net
    task.build = build_without_values
    task.compile_net = False
    task.log = lambda *args, **kwargs: None
    task._apply = lambda function, recurse=True: _convert(task, function)


def _convert(module: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`module._apply(function)`, which torch does by swapping tensors, and fake ones cannot be swapped."""
    converted: dict[int, Tensor] = {}  # a parameter that stands in two places stays one
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in converted:
                    with torch.no_grad():
                        new = function(tensor)
                    if isinstance(tensor, nn.Parameter) and new is not tensor:
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    converted[id(tensor)] = new
                tensors[name] = converted[id(tensor)]
    return module
