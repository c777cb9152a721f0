"""LightningCLI as this project uses it: one folder a run, callbacks that stay, checkpoints that do not override."""

import copy
import inspect
import itertools
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console

import data
import tasks
from data.image_base import ImageModule
from data.image_sources import folder_images

from . import parallel  # noqa: F401 - registers the strategy fsdp2
from .allowed import check_classes
from .callbacks import DataFaults, MultipleChoice, default_callbacks
from .callbacks.checkpoint import RunCheckpoint
from .callbacks.config import SaveRunConfig
from .callbacks.files import write_json
from .callbacks.guard import Guard
from .callbacks.predictions import DEFAULT, PredictionFile
from .callbacks.preemption import REQUEUE, Preemption
from .callbacks.progress import StepProgress
from .callbacks.pruning import Pruning, rewind_checkpoint
from .callbacks.report import RunReport, metrics_table
from .callbacks.validation import ValidationSchedule
from .callbacks.watchdog import Watchdog
from .checkpoints import RunCheckpointIO
from .configs import Fragment, load_config
from .controls import hold_mixes, token_means
from .errors import UserError
from .evaluated import Settings, check_pixels, fill_data, settings_of
from .matching import check_kind, check_share
from .mistakes import mistakes, quiet
from .options import Option, Tree
from .result_files import changed_options, result_name
from .run_folder import (
    AUTO,
    CONFIG,
    HELD,
    RUN_DIR_VARIABLE,
    FolderGuard,
    FolderLock,
    checkpoint_path,
    checkpoint_step,
    new_run_dir,
    process_rank,
    refuse_second_run,
    run_of_checkpoint,
)
from .trainer_options import check_devices, check_length, validation_rhythm

COMMANDS = ("fit", "validate", "test", "predict")
# what the data modules take without one
DEFAULT_CLASSES = {"data.transform": "data.SingleView", "data.vision.transform": "data.SingleView"}
TRAINER_DEFAULTS = {
    "log_every_n_steps": 10,
    "check_val_every_n_epoch": None,
    "val_check_interval": None,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # the data modules share their batches among the devices
    "enable_model_summary": False,
}
CHECKPOINT_DEFAULTS = {
    "checkpoint.filename": "step{step:07d}",
    "checkpoint.auto_insert_metric_name": False,
    "checkpoint.save_last": True,
    "checkpoint.save_on_train_epoch_end": False,
    # a version counter would write last-v1.ckpt beside last.ckpt in a folder that was moved, and none would continue it
    "checkpoint.enable_version_counter": False,
}
CALLBACK_OPTIONS = {"checkpoint": RunCheckpoint, "guard": Guard, "pruning": Pruning, "watchdog": Watchdog}


class MoaCLI(LightningCLI):
    """fit, validate, test and predict for the tasks and data modules of this project.

    Args:
        arguments: the command line after `moa`, its config merged and checked.
        notes: what a fit prints besides its own description.
    """

    def __init__(self, arguments: list[str], notes: list[str]) -> None:
        self.notes = notes
        self.guard: FolderGuard | None = None
        self.judged: Settings | None = None  # what is known of the run whose checkpoint is evaluated
        self.first_step = 0
        fit = arguments[0] == "fit"
        strict = {"exit_on_error": False, "allow_abbrev": False}
        try:
            super().__init__(
                tasks.Task,
                data.DataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=SaveRunConfig if fit else None,
                seed_everything_default=0,
                trainer_defaults={**TRAINER_DEFAULTS, "callbacks": default_callbacks() if fit else [DataFaults()]},
                parser_kwargs={**strict, **{name: dict(strict) for name in COMMANDS}},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                args=arguments,
            )
        except BaseException as error:
            self._clean_up()
            if isinstance(error, SIGTERMException):
                raise SystemExit(REQUEUE) from error
            if isinstance(error, SystemExit) and error.code == 1:  # Lightning's end after Ctrl-C
                raise SystemExit(128 + signal.SIGINT) from error
            raise
        finally:
            os.environ.pop(RUN_DIR_VARIABLE, None)

    def _clean_up(self) -> None:
        """End the processes that were launched, and leave no folder where no step was taken."""
        trainer: L.Trainer | None = getattr(self, "trainer", None)
        launcher = None if trainer is None else trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launched = list(launcher.procs)
            launcher.procs.clear()  # the launcher's observer has this list: it kills this process for a child that died
            launcher.procs = launched
            launcher.kill(signal.SIGKILL)  # they may wait for this one in a collective call, which SIGTERM cannot end
        trial = trainer is not None and trainer.fast_dev_run  # type: ignore[attr-defined]
        if self.guard is not None and (trainer is None or trial or trainer.global_step <= self.first_step):
            self.guard.clean(self.run_dir)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run: config, events, metrics, checkpoints (default: runs/<task>/version_<next>).",
        )
        parser.add_argument(
            "--freeze_gates",
            type=int,
            default=0,
            help="validate: once more with every mix held at its mean over so many training batches (default: 0, not).",
        )
        parser.add_argument(
            "--choices",
            type=str | list[str] | None,
            default=None,
            help="JSONL files of multiple-choice questions (HellaSwag, ARC), answered by a language model at every "
            "validation and test.",
        )
        parser.add_argument("--folder", type=str | None, default=None, help="predict: the images of this folder.")
        parser.add_argument("--out", type=str | None, default=None, help="predict: file to write, .npz or .parquet.")
        parser.usage = "moa COMMAND [--option value ...]"
        parser.add_argument("--import", type=list[str], default=[], help="Python modules to import first.")
        for name, kind in CALLBACK_OPTIONS.items():
            parser.add_lightning_class_args(kind, name)
        parser.set_defaults(CHECKPOINT_DEFAULTS)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        own = self.config[self.config.subcommand]
        check_classes(own.as_dict(), own["import"])
        seed = own["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < 2**32:
            raise UserError(f"--seed_everything is {seed}; give a whole number from 0 to {2**32 - 1}")

    def _parse_ckpt_path(self) -> None:
        """Nothing: the command line and the configs say what is built, not the checkpoint."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        given = config["run_dir"]
        if given is not None and not Path(given).name:  # "." has no name that a logger could take
            given = os.path.abspath(given)
        restart = config.get("ckpt_path") == AUTO
        checkpoint = config["ckpt_path"] = checkpoint_path(config.get("ckpt_path"), given)
        if checkpoint is not None:
            self.first_step = checkpoint_step(checkpoint)
        check_devices(config["trainer"])
        if config["freeze_gates"] and self.subcommand != "validate":
            raise UserError(f"--freeze_gates belongs to moa validate, not to moa {self.subcommand}")
        if self.subcommand != "predict" and (config["folder"] or config["out"]):
            raise UserError(f"--folder and --out belong to moa predict, not to moa {self.subcommand}")
        if self.subcommand == "fit":
            check_length(config["trainer"])
            rewind_to = config["pruning"]["rewind_to"]
            if checkpoint is None and rewind_to is not None:
                config["ckpt_path"] = rewind_checkpoint(rewind_to)
                self.first_step = checkpoint_step(config["ckpt_path"])
            self._claim_folder(Path(given) if given else None, config, checkpoint, restart)
        elif checkpoint is None:
            raise UserError(f"moa {self.subcommand} needs --ckpt_path with the checkpoint to load")
        else:
            self.run_dir = Path(given or run_of_checkpoint(checkpoint) or Path(checkpoint).parent)
            self.judged = settings_of(checkpoint)
            fill_data(config["data"], self.judged)

    def _claim_folder(self, given: Path | None, config: Any, checkpoint: str | None, restart: bool) -> None:
        root = Path(config["trainer"]["default_root_dir"] or "runs")
        root /= config["model"]["class_path"].rpartition(".")[2].lower()
        if given is not None:
            refuse_second_run(given, checkpoint, restart)
        self.guard = FolderGuard(given, root)
        self.run_dir = new_run_dir(given, root)
        self.lock = FolderLock(self.run_dir) if process_rank() == 0 else None
        os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")
        check_kind(self.model, self.datamodule)
        if self.judged is not None:
            filled = self.model.fill_open(self.judged.task)
            check_pixels(filled, self.datamodule)
        if folder := self._get(self.config, "folder"):
            if not isinstance(self.datamodule, ImageModule):
                raise UserError("--folder is for models of images, and this one reads text")
            self.datamodule.predict_on(folder_images(folder, self.datamodule.channels))
        try:
            self.trainer = self.instantiate_trainer()
        except UserError:
            raise
        except (ValueError, TypeError) as error:  # the Trainer's own check of its options
            raise UserError(f"trainer: {error}") from error
        if self.subcommand == "fit":
            check_share(self.model, self.datamodule, self.trainer.world_size)
        elif self.subcommand == "validate" and self._get(self.config, "freeze_gates"):
            self._check_gates_can_be_held()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        callbacks = [config["callbacks"]] if isinstance(config["callbacks"], L.Callback) else config["callbacks"] or []
        own: list[L.Callback] = []
        if config["enable_checkpointing"] is False:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            own.append(StepProgress())
        choices = self._get(self.config, "choices")
        if choices and self.subcommand != "predict":
            own.append(MultipleChoice(choices))
        kwargs |= {"default_root_dir": str(self.run_dir), "logger": False}
        if self.subcommand == "fit":
            steps, options = validation_rhythm(config)
            own += [
                ValidationSchedule(steps),
                Preemption(),
                RunReport(
                    None if config["fast_dev_run"] else self.run_dir, self.notes, self._get(self.config, "import")
                ),
            ]
            kwargs |= options
            kwargs["logger"] = loggers(self.run_dir, config["logger"])
        elif self.subcommand == "predict":
            out = self._get(self.config, "out")
            own.append(PredictionFile(Path(out) if out else self.run_dir / DEFAULT))
        plugins = config["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), RunCheckpointIO()]
        return super().instantiate_trainer(callbacks=[*own, *callbacks], **kwargs)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        quiet = {"validate": {"verbose": False}, "test": {"verbose": False}, "predict": {"return_predictions": False}}
        return {**kwargs, **quiet.get(subcommand, {})}

    def after_fit(self) -> None:
        if self.guard is not None and self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.guard.clean(self.run_dir)

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(metrics_table(self._metrics()))
        if batches := self._get(self.config, "freeze_gates"):
            self._validate_with_held_gates(batches)

    def _check_gates_can_be_held(self) -> None:
        if self.trainer.world_size > 1:
            raise UserError("--freeze_gates needs the whole net in one process: set --trainer.devices 1")
        if isinstance(self.model, tasks.Joint) and self.model.tie:
            raise UserError(
                "--freeze_gates holds each mix at its own mean, which tied ones cannot have; add --model.tie '[]' to "
                "hold them one by one"
            )

    def _validate_with_held_gates(self, batches: int) -> None:
        """Validate again with the gates at their mean over training data; both results go to held_gates.json."""
        trained = self._metrics()
        self.model.keep_weights()
        self.model.to(self.trainer.strategy.root_device).eval()
        loader = self.datamodule.train_dataloader()
        found = (each[0] if isinstance(loader, CombinedLoader) else each for each in loader)
        data = (self._on_device(batch) for batch in itertools.islice(found, batches))
        with self.trainer.precision_plugin.forward_context(), isolate_rng():
            means = token_means(self.model, self.model.mix_forward, data)
        if not hold_mixes(self.model, means):
            raise UserError("--freeze_gates: the net of this run has no learned mix")
        self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        held = self._metrics()
        names = sorted(trained)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / HELD, {"batches": batches, "trained": trained, "held": held})
        Console().print(f"with the mixes held at their mean over {batches} training batches:")
        Console().print(metrics_table({name: held[name] for name in names}))

    def _on_device(self, batch: Any) -> Any:
        return self.model.transfer_batch_to_device(batch, self.trainer.strategy.root_device, 0)

    def after_test(self) -> None:
        if self.trainer.is_global_zero:
            Console().print(metrics_table(self._metrics()))
            self.run_dir.mkdir(parents=True, exist_ok=True)
            checkpoint = self._get(self.config, "ckpt_path")
            run = run_of_checkpoint(checkpoint)
            own = {} if run is None else load_config(str(run / CONFIG)).content.get("data") or {}
            changed = changed_options(self._get(self.config, "data").as_dict(), own)
            written = {**({"data": changed} if changed else {}), "metrics": self._metrics()}
            write_json(self.run_dir / result_name(changed), written)

    def _metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def after_predict(self) -> None:
        file = next(c for c in self.trainer.callbacks if isinstance(c, PredictionFile))  # type: ignore[attr-defined]
        shapes = ", ".join(f"{name} {shape}" for name, shape in file.shapes.items())
        Console(soft_wrap=True, highlight=False).print(f"{file.path}: {shapes}", markup=False)


def loggers(run_dir: Path, given: Any) -> Any:
    """TensorBoard events right in the run's folder, and the loggers of the config; False where it wants none."""
    if given is False:
        return False
    extra = given if isinstance(given, list) else [given] if isinstance(given, Logger) else []
    return [TensorBoardLogger(run_dir.parent, name="", version=run_dir.name, default_hp_metric=False), *extra]


def option_roots(command: str) -> dict[str, Any]:
    """The first level of a command's options, for options.Tree."""
    handed_over = ("self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders")
    own = set(inspect.signature(getattr(L.Trainer, command)).parameters) - set(handed_over)
    groups: dict[str, dict[str, None]] = {}
    for name, kind in (("trainer", L.Trainer), *CALLBACK_OPTIONS.items(), ("checkpoint", ModelCheckpoint)):
        groups.setdefault(name, {}).update(dict.fromkeys(inspect.signature(kind).parameters))
    del groups["checkpoint"]["kwargs"]
    ours = ("print_config", "seed_everything", "run_dir", "freeze_gates", "choices", "folder", "out", "import")
    return {**groups, "model": tasks.Task, "data": data.DataModule, **dict.fromkeys((*ours, *sorted(own)))}


def run_lightning_command(
    command: str, config: dict[str, Any], options: list[Option], fragments: list[Fragment], notes: list[str]
) -> None:
    """Check and run one of fit, validate, test, predict.

    Args:
        config: the merged config files.
        options: the rest of the command line.
        fragments: the files, for messages.
        notes: what a fit prints besides its own description.

    Raises:
        UserError: for a mistake in the input.
    """
    with mistakes(options, fragments), quiet(), tempfile.TemporaryDirectory() as folder:
        tree = Tree(option_roots(command), copy.deepcopy(config), fragments, DEFAULT_CLASSES)
        questions = [option for option in options if option.key == "help" or option.key.endswith(".help")]
        if questions:
            options = tree.answerable(questions)
        else:
            options = tree.enter_classes(options)
            tree.check(options)
        merged = Path(folder) / CONFIG
        merged.write_text(yaml.safe_dump(tree.config, sort_keys=False))
        files = [] if questions else ["--config", str(merged)]
        MoaCLI([command, *files, *map(str, options)], [*notes, *tree.notes])
