"""What a checkpoint gave the optimiser and the counters of the training loop, checked before the first step.

Lightning and torch take any state that a file holds. Fused kernels then run over it with the sizes of the parameters:
a tensor that is too short is read and written past its end, which ended a process with a segmentation fault.
"""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.optim import Adam, Optimizer

from ..errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # AdamW is one
COUNTERS = ("ready", "started", "processed", "completed")


class RestoredState(L.Callback):
    """Raises UserError where what a resumed run was given does not fit it."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            check_state(optimizer)
        if not all(type(count) is int and count >= 0 for count in _counts(trainer.fit_loop.state_dict())):
            raise UserError(
                "the checkpoint's counts of batches and steps are no counts; it is damaged, so give another"
            )


def check_state(optimizer: Optimizer) -> None:
    """Raise UserError unless every moment has the shape of its parameter, every step count is one number, and every
    group's settings are of the kind that the optimiser began with."""
    groups = optimizer.param_groups
    if not all(
        _option_fits(default, group.get(name)) for group in groups for name, default in optimizer.defaults.items()
    ):
        raise UserError(
            "the checkpoint's optimiser has settings that are none; it is damaged or of another optimiser, so give "
            "another one"
        )
    group_of = {parameter: group for group in groups for parameter in group["params"]}
    for parameter, state in optimizer.state.items():
        # torch keeps entries of the file that belong to no parameter under the number that they had
        known = parameter in group_of and isinstance(state, dict)
        fits = known and all(_fits(name, value, parameter) for name, value in state.items())
        if fits and state and isinstance(optimizer, Adam):
            fits = state.keys() >= _wanted(group_of[parameter])
        if not fits:
            raise UserError(
                "the checkpoint's optimiser state does not fit the parameters; it is damaged or of another net, so "
                "give another one"
            )


def _wanted(group: dict[str, Any]) -> set[str]:
    """What an Adam, or a MuonAdamW, reads from the state of a parameter."""
    if group.get("momentum") is not None:
        return {"step", "momentum_buffer"}
    return ADAM | ({"max_exp_avg_sq"} if group.get("amsgrad") else set())


def _counts(node: Any) -> Iterator[Any]:
    """What stands under the names of counters in a nested state."""
    for name, child in node.items() if isinstance(node, dict) else ():
        if name in COUNTERS:
            yield child
        else:
            yield from _counts(child)


def _option_fits(default: Any, value: Any) -> bool:
    if default is None or isinstance(default, bool):
        return value is None or isinstance(value, bool)
    if isinstance(default, tuple):
        same = isinstance(value, tuple | list) and len(value) == len(default)
        return same and all(map(_option_fits, default, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits(name: str, value: Any, parameter: torch.Tensor) -> bool:
    if name in MOMENTS:
        return isinstance(value, torch.Tensor) and value.shape == parameter.shape and value.is_floating_point()
    if name == "step":
        return isinstance(value, int | float) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return True
