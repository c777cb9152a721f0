"""The masked-patch loss of iBOT (Zhou et al., arXiv 2111.07832, eq. 2) with the weights of DINOv2 (Oquab et al., arXiv
2304.07193): the student, which does not see some patches of a crop, predicts what the teacher, which does, says of
each."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .centering import CenteredLoss


def masked_positions(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Where masked patches lie, and how much each counts. In NumPy, as a GPU would have to be waited for to say how
    many they are.

    Args:
        mask: (n, N), True where a patch of a crop is masked.

    Returns:
        positions: (M,) of the masked patches in the flattened mask, in their order.
        weights: (M,), 1 / (n · masked patches of its crop). A sum with these weights is a mean over crops of means over
            their masked patches; a crop without any counts as 0.
    """
    crops, _ = mask.nonzero()
    weights = 1 / (len(mask) * mask.sum(1)[crops])
    return np.flatnonzero(mask), weights.astype(np.float32)


class IBOTLoss(CenteredLoss):
    """See CenteredLoss for its options; centre and assignments are those of masked patches alone."""

    def forward(self, student: Tensor, teacher: Tensor, weights: Tensor, teacher_temperature: float) -> Tensor:
        """Weighted sum of the cross-entropies of masked patches, a scalar.

        Args:
            student, teacher: (M, K) outputs for the masked patches; M may be 0.
            weights: (M,), see masked_positions.
            teacher_temperature: divides the centred teacher outputs.
        """
        dtype = torch.promote_types(student.dtype, torch.float32)
        log_p = F.log_softmax(student.to(dtype) / self.student_temperature, dim=-1)
        q = self.log_targets(teacher.to(dtype), teacher_temperature).exp()
        return -(weights * (q * log_p).sum(-1)).sum()
