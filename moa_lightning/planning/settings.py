"""Reads the configuration of a fit without fitting: the same files, options, checks and sentences as `moa fit`.

Data are not needed. Where the configuration names no data module, the task's usual one stands in; where it leaves open
which data to read, nothing is read. What follows from data (vocabulary, image size, channels) is the data module's
default then, or an option: --model.vocab_size, --data.context_length, --data.image_size, --data.channels.
"""

import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import data
import tasks
from data.image_base import ImageModule
from data.labelled_text import LabelledText
from data.text import TextModule, TokenModule

from ..configs import Fragment
from ..errors import UserError
from ..lightning_cli import DEFAULT_CLASSES, MoaCLI, option_roots
from ..matching import check_kind
from ..options import Option, Tree, find_class, import_path
from ..parallel import FSDPStrategy
from ..trainer_options import check_length

STRATEGIES = ("auto", "ddp", "fsdp2")
PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16-true")
UNREAD = "-"  # stands for the place of data that nobody reads
PLACES = ("source", "train")  # arguments of data modules that say where data are


class _ParsedFit(MoaCLI):
    """A fit that is parsed and built, and not run."""

    def before_instantiate_classes(self) -> None:
        """No folder is claimed, and no device has to be there."""

    def instantiate_classes(self) -> None:
        self.new_task()

    def new_task(self) -> tasks.Task:
        """The task and the data module, built anew."""
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        check_kind(self.model, self.datamodule)
        return self.model

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Settings:
    """What a plan needs to know of a fit."""

    new_task: Callable[[], tasks.Task]
    """makes the task with its net still to be built"""
    data: data.DataModule
    """the data module, its data not read"""
    view_sizes: tuple[int, ...]
    """side of each view of an image, pixels"""
    strategy: str
    replicas: int
    """copies of the net, each sharded over its part of the devices (fsdp2)"""
    low_precision_parameters: bool
    """of FSDPStrategy"""
    precision: str
    accumulate: int
    clip: dict[str, Any]
    """the Trainer's options of gradient clipping"""
    max_steps: int | None
    """optimiser steps, where the Trainer counts them"""
    max_epochs: int | None

    def steps(self, train_samples: int | None) -> int:
        """Optimiser steps of the run.

        Args:
            train_samples: samples of an epoch, for runs whose length is in epochs.

        Raises:
            UserError: the length cannot be known.
        """
        if self.max_steps is not None:
            return self.max_steps
        if self.max_epochs is None or train_samples is None:
            raise UserError("the length of the run depends on its data: give --trainer.max_steps, or --train_samples N")
        batches = train_samples // self.data.batch_size
        return self.max_epochs * -(-batches // self.accumulate)

    @property
    def tokens_per_sample(self) -> int | None:
        return self.data.context_length if isinstance(self.data, TokenModule) else None

    def batch(self, samples: int) -> dict[str, Any]:
        """A batch of the shapes that the data module gives, without content."""
        numbers = {"id": torch.empty(samples, dtype=torch.int64), "seed": torch.empty(samples, dtype=torch.int64)}
        if isinstance(self.data, TextModule):
            shape = (samples, self.data.context_length)
            texts = {name: torch.empty(shape, dtype=torch.int64) for name in ("tokens", "targets")}
            if self.data.mask_documents:
                texts["documents"] = torch.empty(shape, dtype=torch.int32)
            return {**numbers, **texts}
        if isinstance(self.data, LabelledText):
            label = torch.empty(samples, dtype=torch.float32 if self.data.num_classes == 1 else torch.int64)
            tokens = torch.empty(samples, self.data.context_length, dtype=torch.int64)
            return {**numbers, "tokens": tokens, "lengths": torch.empty(samples, dtype=torch.int64), "label": label}
        assert isinstance(self.data, ImageModule)
        views = [torch.empty(samples, self.data.channels, size, size) for size in self.view_sizes]
        return {**numbers, "views": views, "label": torch.empty(samples, dtype=torch.int64)}


def view_sizes(datamodule: data.DataModule) -> tuple[int, ...]:
    """Side of each view of a training image, pixels; none for text."""
    if not isinstance(datamodule, ImageModule):
        return ()
    size = datamodule.image_size
    image = torch.zeros(datamodule.channels, size, size, dtype=torch.uint8)
    return tuple(transform(image).shape[-1] for transform in datamodule.transform.build(size))


def read_settings(config: dict[str, Any], options: list[Option], fragments: list[Fragment]) -> Settings:
    """The settings of a fit from its merged config files and the rest of its command line.

    Raises:
        UserError: what `moa fit` would say, and what a plan cannot do.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = {**config, "data": _data_left_open(config, options)}
        tree = Tree(option_roots("fit"), copy.deepcopy(config), fragments, DEFAULT_CLASSES)
        options = tree.enter_classes(options)
        tree.check(options)
        merged = Path(folder) / "config.yaml"
        merged.write_text(yaml.safe_dump(tree.config, sort_keys=False))
        fit = _ParsedFit(["fit", "--config", str(merged), *map(str, options)], [])
    if isinstance(fit.datamodule, data.Joint):
        raise UserError("moa plan knows fits of one task; plan the two parts of a Joint one by one")
    trainer = fit.config["fit"]["trainer"]
    check_length(trainer)
    strategy, sharding = _strategy(trainer["strategy"])
    for name, value, choices in (
        ("strategy", strategy, STRATEGIES),
        ("precision", trainer["precision"] or "32-true", PRECISIONS),
    ):
        if value not in choices:
            raise UserError(f"trainer.{name} is {value}; moa plan knows {', '.join(choices)}")
    replicas = sharding.get("replicas", 1)
    return Settings(
        new_task=fit.new_task,
        data=fit.datamodule,
        view_sizes=view_sizes(fit.datamodule),
        strategy=strategy,
        replicas=trainer["num_nodes"] if replicas == "nodes" else replicas,
        low_precision_parameters=sharding.get("low_precision_parameters", False),
        precision=str(trainer["precision"] or "32-true"),
        accumulate=trainer["accumulate_grad_batches"],
        clip={name: trainer[name] for name in ("gradient_clip_val", "gradient_clip_algorithm")},
        max_steps=trainer["max_steps"] if trainer["max_steps"] > 0 else None,
        max_epochs=trainer["max_epochs"],
    )


def _strategy(given: Any) -> tuple[str, dict[str, Any]]:
    """The name of a Trainer's strategy and the arguments of FSDPStrategy."""
    if isinstance(given, str):
        return given, {}
    if given["class_path"] == import_path(FSDPStrategy):
        return "fsdp2", dict(given["init_args"])
    return given["class_path"], {}


def _data_left_open(config: dict[str, Any], options: list[Option]) -> Any:
    """What a config says of its data, with the task's usual data module where none is named, and with something in the
    places where data are."""
    model, module = (_class_name(name, config, options) for name in ("model", "data"))
    given, modules = config.get("data"), config.get("import") or []
    arguments = dict(given.get("init_args") or {}) if isinstance(given, dict) else {}
    if module is None:
        if model is None:
            return given  # the check says so
        kind = find_class(tasks.Task, model, "--model", modules)
        if issubclass(kind, tasks.SequenceClassification):
            module = import_path(data.TextTask)
        else:
            text = issubclass(kind, tasks.LanguageModeling)
            module, arguments = import_path(data.TextFiles if text else data.Images), {"source": None, **arguments}
    parameters = inspect.signature(find_class(data.DataModule, module, "--data", modules)).parameters
    for place in (name for name in PLACES if name in parameters):
        required = parameters[place].default is inspect.Parameter.empty
        if arguments.get(place, None if required else UNREAD) is None:
            arguments[place] = UNREAD
    others = {key: value for key, value in given.items() if key != "init_args"} if isinstance(given, dict) else {}
    return {**others, "class_path": module, "init_args": arguments}


def _class_name(name: str, config: dict[str, Any], options: list[Option]) -> str | None:
    """The class that the command line, or else the config, names for the task or the data."""
    typed = [option.value for option in options if option.key in (name, f"{name}.class_path")]
    given = config.get(name)
    return typed[-1] if typed else given.get("class_path") if isinstance(given, dict) else given
