"""The norm of all gradients as one vector, sharded or not; sharded and plain tensors apart."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..sharded import whole

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def total_norm(gradients: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients as one vector, a plain 0-d tensor; 0 without any.

    Sharded gradients count in full: their norm is reduced over the processes, so all of them must call this. Plain
    tensors beside sharded ones are taken to be the same on every process.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        groups[gradient.device_mesh if isinstance(gradient, DTensor) else None].append(gradient)
    norms = [get_total_norm(group) for group in groups.values()]
    norms = [whole(norm) for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def split_sharded(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """Plain tensors and sharded ones apart, each in order; kinds without members are left out.

    torch's operations on lists of tensors take one kind at a time.
    """
    kinds: dict[bool, list[AnyTensor]] = {False: [], True: []}
    for tensor in tensors:
        kinds[isinstance(tensor, DTensor)].append(tensor)
    return [kind for kind in kinds.values() if kind]
