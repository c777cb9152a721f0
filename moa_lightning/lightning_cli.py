"""LightningCLI as this project uses it: one folder a run, callbacks that stay, checkpoints that do not override."""

import contextlib
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import data
import tasks

from . import parallel  # noqa: F401 - registers the strategy fsdp2
from .callbacks import default_callbacks
from .errors import UserError

COMMANDS = ("fit", "validate", "test", "predict")
RUN_DIR_VARIABLE = "MOA_RUN_DIR"  # how the processes that a strategy launches learn the folder that the first one chose


class SaveRunConfig(SaveConfigCallback):
    """Writes <run_dir>/config.yaml; a resumed run keeps the first one and writes config-resumed.yaml."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        self.already_saved = True
        log_dir = trainer.log_dir  # a collective call: every process asks
        if not trainer.is_global_zero or log_dir is None:
            return
        folder = Path(log_dir)
        folder.mkdir(parents=True, exist_ok=True)
        name = "config-resumed.yaml" if (folder / "config.yaml").exists() else "config.yaml"
        self.parser.save(self.config, folder / name, skip_none=False, overwrite=True, multifile=False)


class MoaCLI(LightningCLI):
    """fit, validate, test and predict for the tasks and data modules of this project, by short names."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of this run: config, events, metrics, checkpoints (default: runs/<task>/version_<next>).",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "step{step:07d}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "checkpoint.save_on_train_epoch_end": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: the command line and the configs say what is built, not the checkpoint."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run_dir = self._run_dir(config)
        os.environ[RUN_DIR_VARIABLE] = str(run_dir)
        config["run_dir"] = str(run_dir)
        config["checkpoint"]["dirpath"] = config["checkpoint"]["dirpath"] or str(run_dir / "checkpoints")
        checkpoint = config.get("ckpt_path")
        if checkpoint == "last":
            checkpoint = config["ckpt_path"] = str(Path(config["checkpoint"]["dirpath"]) / "last.ckpt")
        if checkpoint and not Path(checkpoint).exists():
            raise UserError(f"checkpoint '{checkpoint}' does not exist; leave --ckpt_path out to start anew")
        if self.subcommand == "fit":
            self._refuse_second_run(run_dir, checkpoint)
        elif self.subcommand != "fit" and not checkpoint:
            raise UserError(f"moa {self.subcommand} needs --ckpt_path with the checkpoint to load")

    def _run_dir(self, config: Any) -> Path:
        if RUN_DIR_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
            return Path(os.environ[RUN_DIR_VARIABLE])
        if config["run_dir"] is not None:
            return Path(config["run_dir"])
        if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ:
            raise UserError("under torchrun or Slurm name the run's folder with --run_dir, so that all processes agree")
        name = config["model"]["class_path"].rpartition(".")[2].lower()
        root = Path(config["trainer"]["default_root_dir"] or "runs") / name
        version = 0
        while (root / f"version_{version}").exists():
            version += 1
        return root / f"version_{version}"

    @staticmethod
    def _refuse_second_run(run_dir: Path, checkpoint: str | None) -> None:
        first_process = os.environ.get("LOCAL_RANK", "0") == "0"
        if first_process and (run_dir / "config.yaml").exists() and not checkpoint:
            raise UserError(
                f"'{run_dir}' already holds a run; continue it with --ckpt_path last or choose another --run_dir"
            )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        run_dir = Path(self._get(self.config, "run_dir"))
        loggers = self._get(self.config_init, "trainer").get("logger")
        extra = loggers if isinstance(loggers, list) else [loggers] if isinstance(loggers, Logger) else []
        if loggers is not False:
            kwargs["logger"] = [run_logger(run_dir, self._get(self.config, "ckpt_path")), *extra]
        return super().instantiate_trainer(use_distributed_sampler=False, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        parser.set_defaults({"trainer.use_distributed_sampler": False})


def run_logger(run_dir: Path, checkpoint: str | None) -> TensorBoardLogger:
    """TensorBoard events right in the run's folder; what a resumed run writes again after its checkpoint's step
    replaces what was there, so the curves are clean."""
    options = {"purge_step": checkpoint_step(checkpoint) + 1} if checkpoint else {}
    return TensorBoardLogger(save_dir=run_dir.parent, name="", version=run_dir.name, default_hp_metric=False, **options)


def checkpoint_step(path: str) -> int:
    """The optimiser step that a checkpoint (a file, or a folder of shards) was saved at."""
    file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
    try:
        return int(torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:
        raise UserError(f"'{path}' is not a checkpoint of this project ({type(error).__name__})") from error


def run_lightning_command(arguments: list[str]) -> None:
    """Parse and run one of fit, validate, test, predict; raises UserError for a mistake in the input."""
    try:
        MoaCLI(
            tasks.Task,
            data.DataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveRunConfig,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": default_callbacks(),
                "log_every_n_steps": 10,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
            },
            parser_kwargs={"exit_on_error": False, **{name: {"exit_on_error": False} for name in COMMANDS}},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=arguments,
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    finally:
        with contextlib.suppress(KeyError):
            del os.environ[RUN_DIR_VARIABLE]
