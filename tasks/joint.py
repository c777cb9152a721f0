"""A vision task and a language task trained together, with parts of their feed-forward layers tied or not. [O]

    loss = w_vision · loss of the vision task + w_language · loss of the language task

The two tasks are those that train alone; nothing of them is written again here. Each keeps its net, its objective, its
own optimiser settings and its seed, so with nothing tied each domain goes through the very weights of its separate run
(without clipping, whose norm is that of both). In a step in which a domain has no batch (data.vision_ratio), its
parameters and its teacher stand still, apart from what is tied to the other.

What a part logs gets its domain behind the name: val/loss_vision, val/bits_per_byte_language, train/loss_vision;
train/loss is the weighted sum of the domains that had a batch.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from moa_lightning import FFNConfig
from moa_lightning.callbacks.common import domain_of
from moa_lightning.checkpoint_reading import LANGUAGE, PARTS, VISION
from moa_lightning.errors import UserError
from moa_lightning.evaluation.token_classes import TokenClasses
from moa_lightning.models import JointNet
from moa_lightning.models.joint import Tie, tie_layers
from moa_lightning.optim import Optimized, OptimizerConfig, build_joint_optimizer
from moa_lightning.parallel import FSDPStrategy, average_gradients, replicated_parameters

from .base import Task, as_config
from .language_modeling import LanguageModeling
from .vision import SelfSupervised

Part = TypeVar("Part", bound=Task)


class Joint(Task):
    """One fit of a vision task and a language task, on `data.Joint`.

    Args:
        vision: MAE or DINO. Its options (optimizer, seed, compile, ...) are as when it trains alone.
        language: a LanguageModeling, likewise.
        ffn: the feed-forward layers of both, in the place of their own; None: each has its own.
        tie: what the layers of the two transformers share, paired by their place: "alpha" (the base coefficients of
            their mixes), "gates" (u and b), "ffn" (whole layers, of one shape), or none. What is shared starts as in
            the vision net and learns with its optimiser settings.
        vision_weight, language_weight: of the losses.
        seed: of the initial weights of a part that has no seed of its own; None: the run's seed.

    Raises:
        UserError: a weight that makes no sense; when the net is built, layers that cannot be tied.
    """

    forward_methods: tuple[str, ...] = ()

    def __init__(
        self,
        vision: SelfSupervised,
        language: LanguageModeling,
        ffn: FFNConfig | None = None,
        tie: tuple[Tie, ...] = (),
        vision_weight: float = 1.0,
        language_weight: float = 1.0,
        seed: int | None = None,
    ) -> None:
        own = None if ffn is None else as_config(FFNConfig, ffn)
        first, second = _part(vision, SelfSupervised, own), _part(language, LanguageModeling, own)
        super().__init__(first.optimizer_config, seed, False, False)
        self.vision, self.language = first, second
        self.parts: dict[str, Task] = {VISION: first, LANGUAGE: second}
        self.weights = {VISION: vision_weight, LANGUAGE: language_weight}
        self.tie = tuple(dict.fromkeys(tie))
        for domain, part in self.parts.items():
            if part.optimizer_config.average_decay or part.hparams.get("clip_per_parameter"):
                raise UserError(
                    f"a Joint keeps no average of its weights and clips all gradients as one; set model.{domain}."
                    "optimizer.average_decay to 0 and clip_per_parameter to false"
                )
        for name, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise UserError(f"model.{name}_weight is {weight}; give a number above 0")
        if unknown := set(self.tie) - set(get_args(Tie)):
            raise UserError(f"model.tie is {sorted(unknown)[0]!r}; choose from {', '.join(get_args(Tie))}")
        self.keep_hyperparameters(
            {},
            vision=_options(first),
            language=_options(second),
            ffn=own,
            tie=self.tie,
            vision_weight=vision_weight,
            language_weight=language_weight,
            seed=seed,
        )
        for domain, part in self.parts.items():
            part.domain, part.joint_log = domain, self.log
        self.train_features: Tensor | None = None
        self.eval_features: Tensor | None = None
        self._trained: set[str] = set()  # domains with a batch since the last optimiser step
        self._judged: set[str] = set()  # domains with a batch in this evaluation
        self._replicated: list[nn.Parameter] = []  # whole in every process, though the net is sharded

    def fill_open(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """As a task's, for both parts; what the vision task took."""
        taken = {d: part.fill_open(saved.get(d, {}).get("options", {})) for d, part in self.parts.items()}
        return taken[VISION]

    def choose(self) -> None:
        for part in self.parts.values():
            if part.seed is None:
                part.seed = part.hparams["seed"] = self.seed
            part.choose()

    def build(self, seed: int) -> nn.Module:
        net = JointNet(*(part.build(int(part.seed or 0)) for part in self.parts.values()))
        for domain, part in self.parts.items():
            part.__dict__["net"] = getattr(net, domain)  # not as a submodule: the state has each tensor once
        idle = [domain for domain in self.parts if not self._takes_part(domain)]
        for domain in idle:
            getattr(net, domain).requires_grad_(False)
        if self.tie and idle:
            raise UserError(f"model.tie needs both domains, but data.{idle[0]}_ratio is 0; take one of them out")
        if self.tie:
            tie_layers(self.vision.trunk(), self.language.trunk(), self.tie)
        return net

    def _takes_part(self, domain: str) -> bool:
        return self._trainer is None or self.data.ratios[domain] > 0

    def equip(self) -> None:
        for part in self.parts.values():
            part.equip()

    def load_start(self) -> None:
        for part in self.parts.values():
            part.load_start()
            self.starts += part.starts
            self.missing_starts += part.missing_starts

    def watch(self) -> None:
        for part in self.parts.values():
            part.watch()
        if self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy):
            whole = replicated_parameters(self.net)
            self._replicated = [parameter for parameter in self.net.parameters() if parameter in whole]

    def run_configs(self) -> dict[str | None, OptimizerConfig]:
        return {domain: part.run_config() for domain, part in self.parts.items()}

    def build_optimizer(self) -> dict[str, Any]:
        parts: dict[str | None, Optimized] = {}
        for domain, config in self.run_configs().items():
            part = self.parts[str(domain)]
            parts[domain] = Optimized(part.net, config, part.learning_rates())
            self.chosen |= {f"{domain}.{name}": value for name, value in part.chosen.items()}
        return build_joint_optimizer(parts, self.total_steps)

    def on_train_start(self) -> None:
        super().on_train_start()
        for part in self.parts.values():
            part.on_train_start()

    def on_fit_start(self) -> None:
        ratios, strategy = self.data.ratios, self.trainer.strategy
        uneven = len(set(ratios.values())) > 1 and min(ratios.values()) > 0
        if uneven and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise UserError(
                f"with {ratios[VISION]} : {ratios[LANGUAGE]} batches one net has no turn in some steps, which DDP has "
                "to be told: set --trainer.strategy ddp_find_unused_parameters_true"
            )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """What a part does with a training batch of its own on the host."""
        own = {domain: batch[domain] for domain in self.parts if batch.get(domain) is not None}
        return batch | {d: self.parts[d].on_before_batch_transfer(part, dataloader_idx) for d, part in own.items()}

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        return self.net(lambda: self._loss(batch, batch_index))

    def _loss(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        losses = []
        for domain, part in self.parts.items():
            own = batch.get(domain)
            if own is not None:
                self._trained.add(domain)
                loss = part.training_step(own, batch_index)
                assert isinstance(loss, Tensor)
                losses.append(self.weights[domain] * loss)
        total = torch.stack(losses).sum()
        self.train_features = self.vision.train_features if batch.get(VISION) is not None else None
        self.log("train/loss", total.detach(), sync_dist=True)
        return total

    def on_after_backward(self) -> None:
        average_gradients(self._replicated)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for domain in [domain for domain in self.parts if domain in self._trained]:
            self.parts[domain].on_before_optimizer_step(optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lightning computes the losses inside the optimiser's step, and afterwards the parts move what follows it."""
        before = {domain: part.before_step() for domain, part in self.parts.items()}
        super().optimizer_step(*args, **kwargs)
        for domain in [domain for domain in self.parts if domain in self._trained]:
            self.parts[domain].step_skipped = self.step_skipped
            self.parts[domain].after_step(before[domain])
        self._trained = set()

    def validation_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        self._evaluate("validation_step", batch, batch_index, dataloader_idx)

    def test_step(self, batch: dict[str, Any], batch_index: int, dataloader_idx: int = 0) -> None:
        self._evaluate("test_step", batch, batch_index, dataloader_idx)

    def _evaluate(self, step: str, batch: dict[str, Any], *place: int) -> None:
        domain = domain_of(batch)
        self._judged.add(domain)
        judge = getattr(self.parts[domain], step)
        self.net(lambda: judge(batch, *(place if domain == VISION else place[:1])))
        self.eval_features = self.vision.eval_features if domain == VISION else None

    def on_validation_epoch_end(self) -> None:
        self._end("on_validation_epoch_end")

    def on_test_epoch_end(self) -> None:
        self._end("on_test_epoch_end")

    def _end(self, hook: str) -> None:
        for domain in [domain for domain in self.parts if domain in self._judged]:
            getattr(self.parts[domain], hook)()
        self._judged = set()

    def predict_step(self, *_: Any) -> None:
        raise UserError(
            "moa predict takes the samples of one task; make one of this joint run's a run of its own with moa export "
            "--to run"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The parts' options, with what was filled in since they were made, and what each would keep by itself."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] |= {domain: _options(part) for domain, part in self.parts.items()}
        checkpoint[PARTS] = {domain: {} for domain in self.parts}
        for domain, part in self.parts.items():
            part.on_save_checkpoint(checkpoint[PARTS][domain])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for domain, part in self.parts.items():
            part.on_load_checkpoint(checkpoint.get(PARTS, {}).get(domain, {}))

    def mix_forward(self, batch: dict[str, Any]) -> None:
        def work() -> None:
            for domain, part in self.parts.items():
                if batch.get(domain) is not None:
                    part.mix_forward(batch[domain])

        self.net(work)

    def samples_per_batch(self, batch: dict[str, Any]) -> int:
        counts = {d: self.parts[d].samples_per_batch(own) for d, own in batch.items() if own is not None}
        return sum(counts.values())

    def tokens_per_batch(self, batch: dict[str, Any]) -> int | None:
        own = batch.get(LANGUAGE)
        return None if own is None else self.language.tokens_per_batch(own)

    def flops_per_sample(self) -> float:
        """Mean over the samples of a long run at the data's batch sizes and ratios."""
        counts = {domain: self.data.ratios[domain] * self.data.parts[domain].batch_size for domain in self.parts}
        flops = sum(n * self.parts[domain].flops_per_sample() for domain, n in counts.items() if n)
        return flops / sum(counts.values())

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return self.net(lambda: self.parts[domain_of(batch)].pictures(batch))

    def token_classes(self, batch: dict[str, Any]) -> TokenClasses | None:
        return self.parts[domain_of(batch)].token_classes(batch)

    def texts(self) -> dict[str, str]:
        return self.net(self.language.texts)


def _part(given: Any, base: type[Part], ffn: FFNConfig | None) -> Part:
    """A part from itself or from what a checkpoint says of it, with the feed-forward layer of both domains if any."""
    options = given if isinstance(given, dict) else _options(given)
    kinds = {kind.__name__: kind for kind in (base, *base.__subclasses__())}
    if options.get("task") not in kinds:
        raise UserError(f"the joint task has no part {options.get('task')!r}; known are {', '.join(kinds)}")
    return kinds[options["task"]](**{**options["options"], **({} if ffn is None else {"ffn": ffn})})


def _options(part: Task) -> dict[str, Any]:
    """A task as plain values, from which it can be made again."""
    return {"task": type(part).__name__, "options": dict(part.hparams)}
