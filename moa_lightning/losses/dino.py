"""DINO's loss: cross-entropy between the teacher's centred, sharpened outputs and the student's, over pairs of
different crops (Caron et al., arXiv 2104.14294, eq. 1-3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import without_autocast
from .centering import CenteredLoss


class DINOLoss(CenteredLoss):
    """See CenteredLoss for its options.

    Attributes:
        mean_entropy: of the mean of the last batch's teacher distributions, nats: 0 where all crops get one prototype.
    """

    mean_entropy: Tensor

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
        log_q = self.log_targets(teacher.to(dtype), teacher_temperature).unflatten(0, batch_crops[1])
        q = log_q.exp()
        with without_autocast(q.device.type):  # which would round both to bfloat16 for the product
            cross = -torch.einsum("tbk,sbk->ts", q, log_p) / q.shape[1]  # (globals, crops)
        different = ~torch.eye(*cross.shape, dtype=torch.bool, device=cross.device)
        entropy = -(q * log_q).sum(-1).mean()
        self.mean_entropy = torch.special.entr(q.mean((0, 1))).sum()
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
