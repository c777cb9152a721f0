"""One run as a process of its own, forked from a warm one.

A fresh process spends seconds on importing torch and Lightning before it does anything, which a grid of short runs
pays again and again. So one process (multiprocessing's fork server) imports them once and is forked for every run.
That is sound because the server only imports: it has a single thread (the tests look), draws no random number and
never touches an accelerator. A run is a session of its own, so that signals reach it together with the processes that
it starts (data workers, ranks), and it ends with the grid, even where the grid is killed.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from moa_lightning.errors import Diverged, UserError
from moa_lightning.experiments.grid import Run
from moa_lightning.experiments.grid_file import digest
from moa_lightning.experiments.state import DIVERGED, RECORD, last_line, measured, share_lock
from moa_lightning.run_folder import RESULT

Fit = Callable[[list[str]], int | None]  # arguments after `moa` -> exit status

COMMAND = (sys.executable, "-m", "moa_lightning.experiments.worker")  # and the folder of a run: executes it
PRELOAD = (
    "lightning.pytorch.cli",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
    "timm",
    "moa_lightning.lightning_cli",
    "tasks",
    "data",
)


def moa(arguments: list[str]) -> int | None:
    """The command `moa`, imported where it runs: the grid's own process stays light."""
    from moa_lightning.cli import main

    return main(arguments)


def warm_up(preload: Sequence[str] = PRELOAD) -> None:
    """Start the process that runs are forked from; it imports in the background."""
    multiprocessing.set_forkserver_preload(list(preload))
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # otherwise BLAS starts threads on import, and those do not survive a fork
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def start(run: Run, out: Path, threads: int, fit: Fit = moa) -> ForkServerProcess:
    """Start a run; its output goes to `log.txt` in its folder. `out` is the grid's locked folder."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_work, args=(run.folder, out, threads, fit), name=run.name)
    process.start()
    return process


def ask(question: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    """The answer of a function of a command line, worked out in a process of its own.

    Raises:
        UserError: that the function has raised.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, question, arguments))
    process.start()
    sender.close()
    try:
        ok, answer = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that measures a run ended with exit status {process.exitcode}") from None
    process.join()
    if not ok:
        raise UserError(answer)
    return answer


def _answer(sender: Connection, question: Callable[[list[str]], Any], arguments: list[str]) -> None:
    try:
        sender.send((True, question(arguments)))
    except UserError as error:
        sender.send((False, str(error)))


def execute(folder: Path, fit: Fit) -> int:
    """Do what the record of a run says: train it, or go on training, then measure it once. Returns the exit status.

    A job of a batch system may begin hours after it was sent there, so the config files are looked at again.
    """
    record = json.loads((folder / RECORD).read_text())
    for path, known in record["configs"].items():
        if digest(Path(path)) != known:
            print(f"{path} was edited since the grid began: undo it, or start the grid again under another `out`.")
            return UserError.exit_code
    if not (folder / RESULT).is_file() and (status := _command(record["fit"], fit)):
        if status == Diverged.exit_code:
            (folder / DIVERGED).write_text(json.dumps({"message": last_line(folder / "log.txt")}))
            return 0
        return status
    for result, arguments in record["later"].items():
        if measured(folder, result) is None and (status := _command(arguments, fit)):
            return status
    return 0


def _command(arguments: list[str], fit: Fit) -> int:
    sys.argv = [sys.argv[0], *arguments]  # a DDP launcher repeats the command line for its other ranks
    return fit(arguments) or 0


def stop(processes: Sequence[ForkServerProcess], patience_seconds: float = 15.0) -> None:
    """Ask runs to end (a trainer then stops after its step), and end those that have not after a while."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            _signal(process, number)
        with suppress(KeyboardInterrupt):  # a second Ctrl-C: no more patience
            for process in processes:
                process.join(patience_seconds)


def _work(folder: Path, out: Path, threads: int, fit: Fit) -> None:
    os.setsid()
    threading.Thread(target=_end_with_grid, daemon=True).start()
    share_lock(out)
    _redirect(folder / "log.txt")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for processes that the run starts; the fork itself is told below
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    sys.exit(execute(folder, fit))


def _end_with_grid() -> None:
    grid = multiprocessing.parent_process()
    if grid is not None:
        grid.join()
        os.killpg(0, signal.SIGKILL)


def _redirect(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        os.dup2(descriptor, number)
        stream.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    os.close(descriptor)


def _signal(process: ForkServerProcess, number: int) -> None:
    if process.pid is None or process.exitcode is not None:
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # not yet a session of its own
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


if __name__ == "__main__":  # a job of a batch system
    sys.exit(execute(Path(sys.argv[1]), moa))
