"""A linear classifier that is trained beside a net, on features that it gets for nothing.

Softmax regression on standardised features, as in MAE's protocol (He et al., arXiv 2111.06377, appendix A.1: batch
normalisation without learned scale before the linear layer), with Adam. The gradient is written out, so nothing of it
goes through autograd; everything starts at zero, so it draws no random numbers. The features move while the net learns:
a constant rate lets the classifier follow.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

RATE = 0.01  # of Adam, on features of variance 1
BETAS = (0.9, 0.99)
MOMENTUM = 0.95  # of the running mean and variance of the features
EPS = 1e-6


class LinearProbe:
    """Linear classification of features (B, D) into `classes`; all state is in `state_dict`.

    Args:
        dim: D.
        classes: number of classes.
        device: where features and labels will lie.
    """

    def __init__(self, dim: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        shape = (classes, dim + 1)  # the last column is the bias
        zeros = torch.zeros(shape, device=device)
        self.state = {
            "weight": zeros,
            "first": zeros.clone(),
            "second": zeros.clone(),
            "moments": torch.zeros(2, dim, device=device),  # running mean of features and of their squares
            "steps": torch.zeros((), device=device),
        }

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.state.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], device: torch.device | str) -> "LinearProbe":
        """A probe that goes on from `state_dict`."""
        classes, width = state["weight"].shape
        probe = cls(width - 1, classes, device)
        probe.state = {name: state[name].to(device, copy=True) for name in probe.state}
        return probe

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """One step of Adam on features (B, D) with labels (B,), over all processes together.

        Label -1 and features that are not finite are left out.
        """
        known = (labels >= 0) & features.isfinite().all(1)  # what is not finite would stay in the state for ever
        features = torch.where(known[:, None], features.float(), 0.0)
        count = known.sum().float()
        sums = torch.stack([features.sum(0), features.square().sum(0)])
        _sum_over_processes(sums, count)
        state = self.state
        some = (count > 0).float()  # a step without any label changes nothing
        state["steps"] += some
        share = (1 - MOMENTUM) * some
        state["moments"].lerp_(sums / count.clamp_min(1), share)
        x = self._inputs(features)
        error = (x @ state["weight"].T).softmax(-1) - F.one_hot(labels.clamp_min(0), self.classes)
        gradient = (error * known[:, None]).T @ x
        _sum_over_processes(gradient)
        gradient /= count.clamp_min(1)
        first, second = state["first"], state["second"]
        first.lerp_(gradient, (1 - BETAS[0]) * some)
        second.lerp_(gradient.square(), (1 - BETAS[1]) * some)
        steps = state["steps"].clamp_min(1)
        size = (second / (1 - BETAS[1] ** steps)).sqrt() + EPS
        state["weight"] -= RATE * some * first / (1 - BETAS[0] ** steps) / size

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Classes (B,) of features (B, D)."""
        return (self._inputs(features.float()) @ self.state["weight"].T).argmax(-1)

    def _inputs(self, features: Tensor) -> Tensor:
        """Standardised features with a column of ones, (B, D + 1)."""
        known = (1 - MOMENTUM ** self.state["steps"]).clamp_min(EPS)  # the running means start at zero, as Adam's do
        mean, square = self.state["moments"] / known
        x = (features - mean) / ((square - mean.square()).clamp_min(0) + EPS).sqrt()
        return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _sum_over_processes(*tensors: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
