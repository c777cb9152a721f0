"""What a self-distilling teacher's outputs are turned into before the student learns them, so that they do not
collapse.

"mean": a running mean of the outputs, the centre, is taken away before the softmax (Caron et al., arXiv 2104.14294).
"sinkhorn_knopp": the outputs of a batch are normalised in turn until every prototype is used as much as any other
(Caron et al., SwAV, arXiv 2006.09882; three turns, as in DINOv2, Oquab et al., arXiv 2304.07193). It is done with
logarithms: the same numbers as with products, but nothing overflows, and no total can become zero.
"""

from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Centering: TypeAlias = Literal["mean", "sinkhorn_knopp"]
ITERATIONS = 3


def sinkhorn_knopp(logits: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Logarithms of soft assignments of samples to prototypes, over the samples of all processes.

    Args:
        logits: (n, K), outputs over temperature; n may differ between processes and be 0.
        iterations: each divides by the totals of the prototypes, then by those of the samples.

    Returns:
        (n, K); of the exponentials, those of a sample sum to 1, and those of a prototype to nearly 1/K of the samples.
    """
    for _ in range(iterations):
        logits = logits - _log_totals(logits)
        logits = logits.log_softmax(-1)
    return logits


def _log_totals(logits: Tensor) -> Tensor:
    """Logarithm of each prototype's sum of exponentials over the samples of all processes: (n, K) -> (K,)."""
    own = logits.logsumexp(0)
    if not _distributed():
        return own
    largest = own.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    total = (own - largest).exp()
    dist.all_reduce(total)
    return largest + total.log()


class CenteredLoss(nn.Module):
    """Base of losses whose targets are a teacher's outputs.

    Args:
        out_dim: prototypes K.
        student_temperature: divides the student's outputs.
        center_momentum: weight of the old centre in its running mean.
        centering: "mean" or "sinkhorn_knopp", which has no use for the centre.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
        centering: Centering = "mean",
    ) -> None:
        super().__init__()
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.centering = centering
        self.register_buffer("center", torch.zeros(1, out_dim))
        self._noted: list[tuple[Tensor, int]] = []  # sums (1, K) and numbers of outputs since the centre moved

    @torch.no_grad()
    def log_targets(self, teacher: Tensor, temperature: float) -> Tensor:
        """Logarithms of the distributions that the teacher's outputs (n, K) stand for, in float32 at least."""
        dtype = torch.promote_types(teacher.dtype, torch.float32)
        if self.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(teacher.to(dtype) / temperature)
        return F.log_softmax((teacher.to(dtype) - self.center.to(dtype)) / temperature, dim=-1)

    def update_center(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of the teacher's outputs (n, K), over all processes."""
        self.note(teacher)
        self.move_center()

    @torch.no_grad()
    def note(self, teacher: Tensor) -> None:
        """Remember the teacher's outputs (n, K) of a micro-batch for the next move of the centre."""
        if self.centering == "mean":
            self._noted.append((teacher.to(self.center.dtype).sum(0, keepdim=True), len(teacher)))

    def forget(self) -> None:
        """Leave out what was noted since the last move."""
        self._noted.clear()

    @torch.no_grad()
    def move_center(self) -> None:
        """Move the centre towards the mean of all outputs noted since the last move, over all processes.

        A mean that is not finite is left out: it would stay in the centre for ever, while the optimiser's step is
        skipped. So is that of no outputs at all.
        """
        if not self._noted:
            return
        sums, counts = zip(*self._noted, strict=True)
        self._noted.clear()
        total = sum(sums[1:], start=sums[0])
        count = total.new_full((), sum(counts))  # torch.tensor would have the host wait for a copy to the device
        if _distributed():
            dist.all_reduce(total)
            dist.all_reduce(count)
        moved = self.center * self.center_momentum + total / count * (1 - self.center_momentum)
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
