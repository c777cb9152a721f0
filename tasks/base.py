"""What all tasks share: where the net is built and placed, the optimiser, and what a checkpoint says about the task.

The net is built in `configure_model`, so that strategies can shard it. Sizes that belong to the data (vocabulary, image
size, channels) may be left open: they are then taken from the data module and written into the checkpoint's
hyper-parameters, so that a checkpoint can be loaded without it, and judged on other data.
"""

import math
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from moa_lightning.controls import start_mixes
from moa_lightning.errors import UserError
from moa_lightning.evaluated import PIXELS
from moa_lightning.evaluation.token_classes import TokenClasses
from moa_lightning.models.init import materialize, without_matrices, without_start
from moa_lightning.optim import (
    NO_AVERAGE,
    GroupOptions,
    OptimizerConfig,
    WeightAverage,
    apply_group_options,
    build_optimizer,
    check_branch,
    group_options,
    split_sharded,
    total_norm,
)
from moa_lightning.parallel import FSDPStrategy, checkpoint_blocks, compile_blocks
from moa_lightning.random import named_seed
from moa_lightning.transplants import load_weights

Config = TypeVar("Config")
Recompute: TypeAlias = bool | Literal["selective"]

IDS = ("vocab_size", "num_classes")  # sizes that must reach those of the data, and may be larger


def check_numbers(bounds: str, **options: float | None) -> None:
    """Raise UserError for an option outside an interval such as "(0, 1]"; None is one left open."""
    low, high = map(float, bounds[1:-1].split(","))
    least = f"{'at least' if '[' in bounds else 'above'} {low:g}"
    most = f"{'at most' if ']' in bounds else 'below'} {high:g}" if high < math.inf else "finite"
    for name, value in options.items():
        at_open_end = (value == low and "[" not in bounds) or (value == high and "]" not in bounds)
        if value is not None and (at_open_end or not low <= value <= high):
            raise UserError(f"model.{name} is {value} but must be {least} and {most}")


def as_config(kind: type[Config], value: Any) -> Config:
    """A config dataclass from itself or from plain values, as checkpoints hold them."""
    return value if isinstance(value, kind) else kind(**value)


class Task(L.LightningModule):
    """Base of the tasks. Subclasses give `build`, `training_step` and the evaluation.

    A task may be a part of another one (`Joint`), which then names its `domain`, takes what it logs and steps for it.

    Args:
        optimizer: AdamW or Muon, and the schedule.
        seed: initial weights are a function of (seed, parameter name); None: the run's seed (--seed_everything).
        compile: compile each transformer block (pays off in runs of more than a few minutes).
        activation_checkpointing: recompute each transformer block in the backward pass; "selective" keeps its matrix
            products and attention and recomputes the rest.
        weights_from: a run's folder or a checkpoint whose weights the net starts with, see transplants.py.
    """

    forward_methods: tuple[str, ...] = ("features",)
    open_options: tuple[str, ...] = ()  # filled in from data or length where they are None, and kept for evaluation
    own_start: tuple[str, ...] = ()  # how names of parameters begin that `weights_from` leaves alone

    def __init__(
        self,
        optimizer: OptimizerConfig,
        seed: int | None,
        compile: bool,
        activation_checkpointing: Recompute,
        weights_from: str | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.seed = seed
        self.compile_net = compile
        self.activation_checkpointing = activation_checkpointing
        self.net: Any = None
        self.chosen: dict[str, float] = {}  # options that were computed from data and length, for the log
        self.average: WeightAverage | None = None
        self._group_options: GroupOptions | None = None  # of the optimiser's groups, as the options say
        self._exchanged = False  # the averages are in the net, and its weights where the averages belong
        self.weights_from = weights_from
        self.missing_starts: list[str] = []  # sentences about files that options name and that are not there
        self.starts: list[str] = []  # what was taken over from other runs, for the log
        self.domain: str | None = None
        self.joint_log: Callable[..., None] | None = None
        self.step_skipped = torch.zeros(())  # 1 where the last optimiser step was skipped

    def keep_hyperparameters(self, arguments: dict[str, Any], **parsed: Any) -> None:
        """Store constructor arguments as plain values, which checkpoints can hold without running code.

        Args:
            arguments: locals() of a constructor that has no other variables.
            parsed: what some of them stand for.
        """
        values = {name: value for name, value in {**arguments, **parsed}.items() if name not in ("self", "__class__")}
        self.save_hyperparameters({name: _plain(value) for name, value in values.items()})

    @property
    def data(self) -> Any:
        """The data module; of a part of a joint task, its own."""
        whole = self.trainer.datamodule  # type: ignore[attr-defined]
        return whole if self.domain is None else whole.parts[self.domain]

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        """As Lightning's; a part of a joint task logs through that one, with its domain behind the name."""
        if self.joint_log is None:
            super().log(name, *args, **kwargs)
        else:
            self.joint_log(f"{name}_{self.domain}", *args, **kwargs)

    def from_data(self, name: str) -> Any:
        """The value of an argument, or the data's where it is open; UserError where it is unknown or has no room."""
        value = self.hparams[name]
        known = getattr(None if self._trainer is None else self.data, name, None)
        if value is None:
            if known is None:
                raise UserError(f"{name} is open: give model.init_args.{name}, or train with data that know it")
            value = self.hparams[name] = known
        elif name in IDS and known is not None and known > value:
            raise UserError(f"model.{name} is {value}, but the data have {known}; give at least that, or null")
        return value

    def fill_open(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Take what was left open from a run's hyper-parameters, so that its net is built and not one for other data.

        Returns:
            What was taken.
        """
        named = {name: saved.get(name) for name in self.open_options if self.hparams[name] is None}
        taken = {name: value for name, value in named.items() if value is not None}
        self.hparams.update(taken)
        return taken

    def build(self, seed: int) -> nn.Module:
        """The net with its initial weights."""
        raise TypeError(f"{type(self).__name__} does not say how its net is built")

    def configure_model(self) -> None:
        if self.net is not None:
            return
        if self._trainer is not None and str(self.trainer.precision).startswith("16"):
            raise UserError("float16 is not offered, its range is too small for squared activations: use bf16-mixed")
        decay = self.optimizer_config.average_decay
        if decay and self._trainer is not None and self.trainer.precision == "bf16-true":
            raise UserError(
                "optimizer.average_decay needs float32 weights, as an average moves by less than bfloat16 can tell: "
                "set trainer.precision to bf16-mixed"
            )
        if self.seed is None:
            self.seed = self.hparams["seed"] = int(os.environ.get("PL_GLOBAL_SEED", 0))  # --seed_everything
        self.choose()
        self.net = self._build(self.seed)
        missing, starts = start_mixes(self.net)
        self.starts += starts
        self.missing_starts = [
            f"ffn.start_from: there is no {path}; name a run of LA or MoA that has validated" for path in missing
        ]
        self.equip()
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            self.trainer.strategy.shard(self.net, self.forward_methods)
        materialize(self.net)
        self.load_start()
        if decay:
            self.average = WeightAverage(self.net, decay)
        self.watch()

    def choose(self) -> None:
        """Fill in options that were left open, before the net is built."""

    def equip(self) -> None:
        """Have the net's blocks recomputed or compiled as the options say, before it is sharded."""
        if self.activation_checkpointing:
            checkpoint_blocks(self.net, selective=self.activation_checkpointing == "selective")
        if self.compile_net:
            compile_blocks(self.net)

    def load_start(self) -> None:
        """Give the net the weights of another run, where `weights_from` names one."""
        if self.weights_from is None:
            return
        missing = load_weights(self.net, self.weights_from, self.own_start, self.check_start)
        if missing is None:
            self.starts.append(f"weights from {self.weights_from}")
        else:
            self.missing_starts.append(f"model.weights_from: there is no {missing}; name a run that has saved")

    def check_start(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        """UserError where the weights of a checkpoint would compute something else in this net, though they fit it."""
        there, here = map(self.shapeless, (checkpoint.get("hyper_parameters", {}), self.hparams))
        for name, value in there.items():
            if None not in (value, here[name]) and value != here[name]:
                raise UserError(
                    f"the weights of '{path}' were trained with {name} {value}, and here it is {here[name]}; match it"
                )

    def shapeless(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of hyper-parameters those that change what the net computes and no shape of a weight; None: not known."""
        return {}

    def watch(self) -> None:
        """Hang on the finished net what a training step leaves for callbacks."""

    def choose_schedules(self) -> None:
        """Fill in options that depend on the length of the run, before the optimiser is made."""

    def before_step(self) -> float | None:
        """What `after_step` needs to know from before the optimiser's step."""
        return None

    def after_step(self, before: float | None) -> None:
        """Move what follows the trained parameters."""

    def trunk(self) -> nn.Module:
        """The transformer of the net that is trained and kept."""
        raise TypeError(f"{type(self).__name__} does not name its trunk")

    def _build(self, seed: int) -> nn.Module:
        """The net without the matrices whose values follow from (seed, name), or whole where not all of them do.

        Always on the CPU, where the initial values are drawn; what it draws must not shift the run's random numbers.
        """
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            try:
                with without_matrices():
                    net = self.build(seed)
                loaded = without_start(net)
            except UserWarning:
                loaded = ["loaded weights"]
            if not loaded:
                return net
            rank_zero_info(f"the net is built whole in every process: {loaded[0]} ... do not follow from seed and name")
            return self.build(seed)

    def on_train_start(self) -> None:
        """Refuse to begin without a given start; a run that goes on takes this run's options, not its checkpoint's."""
        if self.global_step == 0 and self.missing_starts:
            raise UserError(self.missing_starts[0])
        if self._group_options is not None:
            schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
            for domain, config in self.run_configs().items():
                check_branch(schedule, config, self.total_steps, domain)
            apply_group_options(schedule, self._group_options)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the global generators, which drop path and mixing of images draw from, so that a resumed run draws what
        it would have drawn. Processes draw apart."""
        seed = named_seed(self.seed or 0, f"step {self.global_step} batch {batch_idx} rank {self.global_rank}")
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def configure_optimizers(self) -> Any:
        built = self.build_optimizer()
        self._group_options = group_options(built["optimizer"])
        return built

    def build_optimizer(self) -> dict[str, Any]:
        """The optimiser and its schedule, see optim.build_optimizer."""
        return build_optimizer(self.net, self.run_config(), self.total_steps, self.learning_rates())

    def run_config(self) -> OptimizerConfig:
        """The optimiser's settings for this run, everything that was left open filled in."""
        self.choose_schedules()
        config = self.optimizer_config.of_run(self.samples_per_step, self.total_steps)
        if self.optimizer_config.reference_batch is not None:
            self.chosen["lr"] = config.lr
        if self.optimizer_config.warmup_steps is None:
            self.chosen["warmup_steps"] = config.warmup_steps or 0
        return config

    def run_configs(self) -> dict[str | None, OptimizerConfig]:
        """The settings of each net in the optimiser, by domain."""
        return {None: self.run_config()}

    def learning_rates(self) -> dict[str, float] | None:
        """Learning rate of each parameter of the net in units of the optimiser's; None: all have the same."""
        return None

    def show_weights(self, which: str) -> None:
        """Have the net hold the "average" or the "last" weights, where there is an average."""
        if self.average is not None and self._exchanged != (which == "average"):
            self.average.exchange(self.net)
            self._exchanged = not self._exchanged

    def keep_weights(self, which: str | None = None) -> None:
        """Go on for good with the "average" or the "last" weights; None: with those that are evaluated.

        Raises:
            UserError: there is no average.
        """
        if which == "average" and self.average is None:
            raise UserError(NO_AVERAGE)
        self.show_weights(which or self.optimizer_config.evaluate)
        self.average, self._exchanged = None, False

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.show_weights(self.optimizer_config.evaluate)

    def on_validation_end(self) -> None:
        self.show_weights("last")

    def on_test_model_eval(self) -> None:
        super().on_test_model_eval()
        self.show_weights(self.optimizer_config.evaluate)

    def on_test_end(self) -> None:
        self.show_weights("last")

    def on_predict_model_eval(self) -> None:
        super().on_predict_model_eval()
        self.show_weights(self.optimizer_config.evaluate)

    def on_predict_end(self) -> None:
        self.show_weights("last")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Weights and averages go under their own names, also while they are exchanged. How images were normalised is
        kept too."""
        mean, std = (getattr(self.data, name, None) for name in ("mean", "std"))
        if mean is not None and std is not None:
            checkpoint[PIXELS] = {"mean": list(mean), "std": list(std)}
        if self.average is not None and self._exchanged:
            state = checkpoint["state_dict"]
            for name in self.average.state_dict():
                weight, average = f"net.{name}", f"average.{name}"
                state[weight], state[average] = state[average], state[weight]

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        before = self.before_step()
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.follow(self.net, self.global_step)  # this step counts as taken once this method is over
        self.after_step(before)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, and have the optimiser skip a step whose gradient is not finite.

        Lightning's own clipping refuses a fused optimiser under mixed precision, because such a one may unscale
        gradients; without a gradient scaler (bf16) there is nothing to unscale. The fused step reads `found_inf` on the
        device, so nothing here waits for it. The norm is that over all processes, so all of them skip.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = total_norm(p.grad for p in parameters if p.grad is not None)
        self.step_skipped = (~norm.isfinite()).float()
        optimizer.found_inf = self.step_skipped  # type: ignore[attr-defined]
        for group in split_sharded(parameters):  # torch clips either kind, not both at once
            if gradient_clip_val and gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(group, gradient_clip_val)
            elif gradient_clip_val:
                self.clip_norm(group, gradient_clip_val, norm)

    def clip_norm(self, parameters: list[nn.Parameter], largest: float, norm: Tensor) -> None:
        """Scale gradients whose norm, all of them as one vector, is larger than `largest`."""
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)

    @property
    def samples_per_step(self) -> int | None:
        """Samples of an optimiser step over all devices; None where the data do not know their batch."""
        samples = getattr(self.data, "batch_size", None)
        return None if samples is None else samples * self.trainer.accumulate_grad_batches

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Raises:
            UserError: the run has no end that can be counted in steps.
        """
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UserError("schedules need the length of the run: set trainer.max_steps or trainer.max_epochs")
        return int(steps)

    @property
    def progress(self) -> float:
        """Share of the run's optimiser steps already taken."""
        return self.global_step / max(1, self.total_steps)

    def mix_forward(self, batch: dict[str, Any]) -> None:
        """Run the net on a training batch as training does, for those who watch its layers."""
        raise TypeError(f"{type(self).__name__} does not say how its net is run")

    def samples_per_batch(self, batch: dict[str, Any]) -> int:
        """Samples in this process's batch."""
        return len(batch["id"])

    def tokens_per_batch(self, batch: dict[str, Any]) -> int | None:
        """Tokens in this process's batch; None where the task does not count in tokens."""
        return None

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of forward and backward for one sample (backward counted as twice the forward)."""
        raise TypeError(f"{type(self).__name__} does not know its FLOPs")

    def active_parameters(self) -> int:
        """Trained parameters that a token meets: all of them, but of experts the chosen ones."""
        return sum(p.numel() for p in self.net.parameters() if p.requires_grad)

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Pictures (3, H, W) in [0, 1] of what the net does with one validation batch."""
        return {}

    def token_classes(self, batch: dict[str, Any]) -> TokenClasses | None:
        """The tokens of a validation batch as the feed-forward layers see them; None where they have no classes."""
        return None

    def texts(self) -> dict[str, str]:
        """Texts that show what the net does."""
        return {}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in asdict(value).items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
