"""Whole tensors and their parts on one process (DTensor), where FSDP2 has sharded a net. Plain tensors pass through."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor in full, the same on every process; all of them call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the shards of another one: every process cuts its part from its own copy."""
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value
