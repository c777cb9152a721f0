"""DINO's loss: cross-entropy between the teacher's centred, sharpened outputs and the student's, over pairs of
different crops (Caron et al., arXiv 2104.14294, eq. 1-3)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class DINOLoss(nn.Module):
    """Args:
    out_dim: prototypes K.
    student_temperature: divides the student's outputs.
    center_momentum: weight of the old centre in its running mean.
    """

    center: Tensor

    def __init__(self, out_dim: int, student_temperature: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(self, student: Tensor, teacher: Tensor, teacher_temperature: float) -> tuple[Tensor, Tensor]:
        """Loss and the teacher's mean entropy.

        Args:
            student: (crops·B, K) outputs, crop after crop, global crops first.
            teacher: (globals·B, K) outputs of the global crops.
            teacher_temperature: divides the centred teacher outputs.

        Returns:
            The mean cross-entropy over pairs (teacher crop, student crop) of different crops, and the mean entropy of
            the teacher's distributions in nats (log K: uniform; 0: one-hot), both scalars.
        """
        dtype = torch.promote_types(student.dtype, torch.float32)
        batch_crops = self._crops(student, teacher)
        log_p = F.log_softmax(student.to(dtype) / self.student_temperature, dim=-1)
        log_p = log_p.unflatten(0, batch_crops[0])  # (crops, B, K)
        logits = (teacher.to(dtype) - self.center.to(dtype)) / teacher_temperature
        log_q = F.log_softmax(logits, dim=-1).unflatten(0, batch_crops[1]).detach()
        q = log_q.exp()
        cross = -torch.einsum("tbk,sbk->ts", q, log_p) / q.shape[1]  # (globals, crops)
        different = ~torch.eye(*cross.shape, dtype=torch.bool, device=cross.device)
        entropy = -(q * log_q).sum(-1).mean()
        # a sum and not cross[different], for which a GPU would have to tell the host how many there are
        return torch.where(different, cross, 0.0).sum() / different.sum(), entropy

    @staticmethod
    def _crops(student: Tensor, teacher: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        batch = len(teacher) // 2
        if len(teacher) % 2 or len(student) % batch:
            raise ValueError(
                f"{len(student)} student and {len(teacher)} teacher outputs are not whole crops of 2 globals"
            )
        return (len(student) // batch, batch), (2, batch)

    @torch.no_grad()
    def update_center(self, teacher: Tensor) -> None:
        """Move the centre towards the mean of the teacher's outputs (n, K), over all processes.

        A mean that is not finite is left out: it would stay in the centre for ever, while the optimiser's step is
        skipped.
        """
        total = teacher.to(self.center.dtype).sum(0, keepdim=True)
        count = total.new_full((), len(teacher))  # torch.tensor would have the host wait for a copy to the device
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
            dist.all_reduce(count)
        moved = self.center * self.center_momentum + total / count * (1 - self.center_momentum)
        self.center.copy_(torch.where(moved.isfinite().all(), moved, self.center))
