"""The command `moa`: LightningCLI for fit, validate, test and predict, and the project's own subcommands.

What differs from a plain LightningCLI, each for a reason that users have met:
* all `-c` files are merged before parsing, so fragments compose in any order (configs.py);
* the command line wins over a checkpoint's hyper-parameters; where no `-c` names a model, a run's own config.yaml is
  used, and the files are laid over it;
* the default callbacks and the checkpoint settings stay when a config adds callbacks;
* every run has one folder, which a second run does not silently share (run_folder.py);
* a user's mistake is one sentence on stderr and exit code 2 (options.py, mistakes.py).

This module imports nothing heavy, so that `moa --help` and a mistyped command answer at once.
"""

import importlib
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .allowed import OWN, allow_packages, check_fragments
from .configs import Fragment, auto_precision, compose, load_config, lookup
from .errors import UserError
from .help import COMMAND_HELP, USAGE

if TYPE_CHECKING:
    from .options import Option

LIGHTNING_COMMANDS = ("fit", "validate", "test", "predict")
OWN_COMMANDS = {  # imported when they are called
    "ablate": "moa_lightning.experiments.command:ablate_command",
    "bench": "moa_lightning.benchmarking.command:bench_command",
    "data": "data.command:data_command",
    "export": "moa_lightning.exchange.export:export_command",
    "generate": "moa_lightning.generate:generate_command",
    "plan": "moa_lightning.planning.command:plan_command",
    "report": "moa_lightning.reports.command:report_command",
    "theory": "moa_lightning.theory.command:theory_command",
}
SETTINGS = (
    "seed_everything",
    "import",
    "model",
    "data",
    "trainer",
    "checkpoint",
    "guard",
    "pruning",
    "watchdog",
    "choices",
)  # of a config.yaml used again
# A mistake of the input shows in all processes; the first one says it and ends the others within this time.
SECONDS_OF_SILENCE = 5.0
ROOT = Path(__file__).parents[1]  # of the packages


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0 done, 1 failed runs in a grid, 2 a mistake in the input or a file that cannot be read or written, 3 a training
    that diverged, 70 a run that hung, 75 stopped by SIGTERM or SIGUSR1 with a checkpoint (to be started again), 130
    stopped by Ctrl-C, 141 nobody reads the output any more.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv[0], argv[1:]) if argv else _usage(2)
        sys.stdout.flush()  # here and not at the interpreter's end, where nothing catches a reader that has gone
        return code
    except SystemExit as end:  # --help, --print_config; after Ctrl-C
        return end.code if isinstance(end.code, int) else 0
    except UserError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells have it
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # 128 + SIGPIPE
        _say(_of_the_system(error))
        return UserError.exit_code


def _usage(code: int) -> int:
    print(USAGE, end="")
    return code


def _nobody_reads() -> bool:
    """Whether what reads the output has gone, as `head` does; what is still to be written is dropped then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _of_the_system(error: OSError) -> str:
    """The sentence about a file or a machine that does not do what it is asked: the file, the reason, the place in the
    code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if any(Path(frame.filename).is_relative_to(ROOT / name) for name in OWN)]
    place = f" ({Path(own[-1].filename).relative_to(ROOT)}, line {own[-1].lineno})" if own else ""
    file = "" if error.filename is None else f"'{os.fsdecode(error.filename)}': "
    return f"{file}{error.strerror or error}{place}; check paths, permissions and free space"


def _say(message: str) -> None:
    from .run_folder import process_rank

    rank = process_rank()
    if rank > 0:
        time.sleep(SECONDS_OF_SILENCE)
    place = f" (process {rank})" if rank > 0 else ""
    print(f"moa{place}: {_one_line(message)}", file=sys.stderr, flush=True)


def _one_line(message: str) -> str:
    """A message without line breaks, and with control characters spelled out: a file name may hold any."""
    text = re.sub(r"\s+", " ", message).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _dispatch(command: str, rest: list[str]) -> int:
    if command in ("-h", "--help", "help"):
        return _usage(0)
    if command in LIGHTNING_COMMANDS:
        if rest in (["-h"], ["--help"]):
            print(COMMAND_HELP[command], end="")
            return 0
        return _run_lightning(command, rest)
    if command not in OWN_COMMANDS:
        raise UserError(f"unknown command '{command}'; choose from {', '.join([*LIGHTNING_COMMANDS, *OWN_COMMANDS])}")
    module, _, function = OWN_COMMANDS[command].partition(":")
    return getattr(importlib.import_module(module), function)(rest) or 0


def _run_lightning(command: str, argv: list[str]) -> int:
    paths, options = split_arguments(argv)
    fragments = [load_config(path) for path in paths]
    named = _last(options, "model") is not None or any("model" in fragment.content for fragment in fragments)
    if not fragments or not named:
        fragments = [*_settings_of_run(options), *fragments]
    if command != "fit" and _last(options, "ckpt_path") is None and not any("help" in o.key for o in options):
        raise UserError(f"moa {command} needs --ckpt_path with the checkpoint to load")
    config = compose(fragments)
    options = import_modules(config, options, fragments)
    options, notes = resolve_precision(config, options)
    from .lightning_cli import run_lightning_command

    run_lightning_command(command, config, options, fragments, notes)
    return 0


def split_arguments(argv: list[str]) -> tuple[list[str], "list[Option]"]:
    """The config files, in order, and the other options.

    Raises:
        UserError: a word that belongs to no option, an option without its value.
    """
    from .options import Option

    paths, options = [], []
    words = iter(range(len(argv)))
    for index in words:
        name, equals, value = argv[index].partition("=")
        if not name.startswith("--") and name not in ("-c", "-h"):
            raise UserError(f"'{argv[index]}' belongs to no option; options are written --name value")
        key = {"-c": "config", "-h": "help"}.get(name, name[2:])
        given: str | None = value if equals else None
        if not equals and index + 1 < len(argv) and not argv[index + 1].startswith(("--", "-c", "-h")):
            given = argv[next(words)]
        if given is None and key not in ("help", "print_config") and not key.endswith(".help"):
            raise UserError(f"{name} needs a value")
        if key == "config":
            paths.append(str(given))
        else:
            options.append(Option(key, given))
    return paths, options


def _last(options: "list[Option]", key: str) -> str | None:
    return next((option.value for option in reversed(options) if option.key == key), None)


def _settings_of_run(options: "list[Option]") -> list[Fragment]:
    """Where no -c names a model: the config.yaml of the run that --ckpt_path (or --run_dir, for `last`) means."""
    checkpoint, run_dir = _last(options, "ckpt_path"), _last(options, "run_dir")
    if checkpoint is None:
        return []
    from .run_folder import AUTO, CONFIG, checkpoint_path, run_of_checkpoint

    found = checkpoint_path(checkpoint, run_dir)
    if found is None and not (Path(str(run_dir)) / CONFIG).is_file():
        raise UserError(f"'{run_dir}' holds no run yet; give the config files with -c besides --ckpt_path {AUTO}")
    run = Path(str(run_dir)) if found is None else run_of_checkpoint(found)
    if run is None:
        if _last(options, "model") is None:
            raise UserError(f"no {CONFIG} lies beside '{found}'; give the config files of its run with -c")
        return []
    saved = load_config(str(run / CONFIG))
    return [Fragment(saved.name, {key: saved.content[key] for key in SETTINGS if key in saved.content})]


def import_modules(config: dict[str, Any], options: "list[Option]", fragments: list[Fragment]) -> "list[Option]":
    """Import the user's modules, put them into the config, and return the other options.

    Raises:
        UserError: a config names what it may not import.
    """
    modules = [option.value or "" for option in options if option.key == "import"]
    check_fragments(fragments, modules)
    allow_packages(modules)
    if modules:
        config["import"] = modules  # which name each one that the files ask for
    for name in modules:
        import_module(name)
    return [option for option in options if option.key != "import"]


def import_module(name: str) -> None:
    """Import a user's module, from the working folder too; what it registers can then be named in options.

    Raises:
        UserError: there is no such module.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        importlib.import_module(name.removesuffix(".py"))
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # the module is there, and something that it imports is not
        raise UserError(
            f"--import '{name}': no module of that name in {Path.cwd()} or among the installed ones"
        ) from error


def resolve_precision(config: dict[str, Any], options: "list[Option]") -> "tuple[list[Option], list[str]]":
    """Put the precision in use into the config, `auto` (the default) resolved.

    Returns:
        The other options, and a line about `auto`.
    """

    def given(key: str) -> Any:
        try:
            return _last(options, key) or lookup(config, key)
        except KeyError:
            return None

    if not isinstance(config.get("trainer") or {}, dict):
        return options, []  # no group of options, which is said where all options are checked
    if given("trainer.precision") in (None, "auto"):
        precision, why = auto_precision(str(given("trainer.accelerator") or "auto"))
        config["trainer"] = {**(config.get("trainer") or {}), "precision": precision}
        return [o for o in options if o.key != "trainer.precision"], [f"precision auto is {precision}: {why}"]
    if "precision" in (config.get("trainer") or {}):  # the parser does not know `auto`, even where it is overruled
        config["trainer"] = {**config["trainer"], "precision": given("trainer.precision")}
    return options, []


if __name__ == "__main__":
    sys.exit(main())
