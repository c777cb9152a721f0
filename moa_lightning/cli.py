"""The command `moa`: LightningCLI for fit, validate, test and predict, and the project's own subcommands.

What differs from a plain LightningCLI, each for a reason that users have met:
* all `-c` files are merged before parsing, so fragments compose in any order (configs.py);
* the command line wins over a checkpoint's hyper-parameters; without `-c`, a run's own config.yaml is used;
* the default callbacks and the checkpoint settings stay when a config adds callbacks;
* every run has one folder, which a second run does not silently share;
* a user's mistake is one sentence on stderr and exit code 2.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .configs import auto_precision, compose, merge
from .errors import UserError

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")

USAGE = """usage: moa COMMAND ...

  fit        train:             moa fit -c configs/vision/mae_tiny.yaml -c configs/ffn/moa.yaml --trainer.max_steps 500
  validate   on held-out data:  moa validate --ckpt_path runs/mae/version_0/checkpoints/last.ckpt
  test       on the test split, once the settings are chosen
  predict    features of images, losses of texts
  ablate     a grid of runs with a table and plots: moa ablate configs/grids/quickstart.yaml
  data       write WebDataset shards:  moa data images --source fashion_mnist --out shards

-c FILE    a config file, any number of them, later ones win; `configs/...` is found inside the package too
moa fit --help                  options of the trainer, the run and the checkpoints
moa fit --model.help MAE        options of a task (LanguageModeling, MAE, DINO)
moa fit --data.help Images      options of a data module (TextFiles, TextShards, Images, ImageShards)
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 failed runs in a grid, 2 a mistake in the input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if argv else 2
    try:
        return _dispatch(argv[0], argv[1:])
    except UserError as error:
        print(f"moa: {_one_line(str(error))}", file=sys.stderr)
        return 2


def _dispatch(command: str, rest: list[str]) -> int:
    if command in LIGHTNING_COMMANDS:
        _run_lightning(command, rest)
        return 0
    own: dict[str, Callable[[list[str]], int | None]] = {"ablate": _ablate, "data": _data}
    if command not in own:
        raise UserError(f"unknown command '{command}'; choose from {', '.join([*LIGHTNING_COMMANDS, *own])}")
    return own[command](rest) or 0


def _ablate(argv: list[str]) -> int:
    from .experiments.command import ablate_command

    return ablate_command(argv)


def _data(argv: list[str]) -> int | None:
    from data.writers import data_command

    return data_command(argv)


def _run_lightning(command: str, argv: list[str]) -> None:
    paths, rest = split_config_options(argv)
    config = compose(paths)
    if not paths and (run := _run_of_checkpoint(rest)) is not None:
        config = _config_of_run(run)
    if config.get("trainer", {}).get("precision") == "auto":
        config["trainer"]["precision"] = auto_precision()
        print(f"moa: precision auto is {config['trainer']['precision']} on this machine", file=sys.stderr)
    from .lightning_cli import run_lightning_command

    with tempfile.TemporaryDirectory() as folder:
        arguments = [command]
        if config:
            import yaml

            merged = Path(folder) / "config.yaml"
            merged.write_text(yaml.safe_dump(config, sort_keys=False))
            arguments += ["--config", str(merged)]
        run_lightning_command([*arguments, *rest])


def split_config_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The values of all -c / --config options, in order, and the other arguments."""
    paths, rest, index = [], [], 0
    while index < len(argv):
        option, _, value = argv[index].partition("=")
        if option not in ("-c", "--config"):
            rest.append(argv[index])
        elif value:
            paths.append(value)
        else:
            index += 1
            if index == len(argv):
                raise UserError(f"{option} needs the name of a config file")
            paths.append(argv[index])
        index += 1
    return paths, rest


def _option(argv: list[str], name: str) -> str | None:
    """The last value of `--name value` or `--name=value`."""
    found = None
    for index, argument in enumerate(argv):
        if argument == f"--{name}" and index + 1 < len(argv):
            found = argv[index + 1]
        elif argument.startswith(f"--{name}="):
            found = argument.partition("=")[2]
    return found


def _run_of_checkpoint(argv: list[str]) -> Path | None:
    """The run folder that --ckpt_path lies in, or --run_dir where the checkpoint is named 'last'."""
    checkpoint, run_dir = _option(argv, "ckpt_path"), _option(argv, "run_dir")
    if checkpoint is None:
        return None
    if checkpoint == "last" and run_dir is not None:
        return Path(run_dir)
    return Path(checkpoint).parent.parent if Path(checkpoint).exists() else None


def _config_of_run(run: Path) -> dict[str, Any]:
    saved = run / "config.yaml"
    if not saved.is_file():
        raise UserError(f"'{run}' holds no config.yaml; give the run's config files with -c")
    config = compose([str(saved)])
    keep = {key: config[key] for key in ("seed_everything", "model", "data", "trainer", "checkpoint") if key in config}
    return merge({}, keep)


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip()


if __name__ == "__main__":
    sys.exit(main())
