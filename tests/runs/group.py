"""Starts a group of processes for DDP or FSDP2 as torchrun would, one group for all fits, and never waits for ever.

`python -m tests.runs.group PROGRAM KIND FOLDER` is what each process runs; environment variables say which one it is.
Processes are forked from one that has imported everything: twenty groups would spend minutes on imports.
"""

import faulthandler
import logging
import multiprocessing
import os
import runpy
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from . import fits, joint_fits
from .fits import ROOT
from .record import Record

Ranks = list[dict[str, Record]]  # what each rank saw, by the name of the fit
SECONDS = 480  # a group that takes longer hangs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def by_kind(program: str, factory: pytest.TempPathFactory) -> Callable[[str], Ranks]:
    """What `run_group` returns for a kind, run when it is first asked for."""
    return cache(lambda kind: run_group(kind, factory.mktemp(kind), program=program))


def run_group(kind: str, folder: Path, world_size: int = 2, program: str = "program") -> Ranks:
    """Run a program of fits.py or joint_fits.py: "one" in this process, other kinds in several.

    Errors as in `start_group`.
    """
    if kind == "one":
        return [_run_here(program, folder)]
    start_group(["tests.runs.group", program, kind, str(folder)], folder, world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_here(program: str, folder: Path) -> dict[str, Record]:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = _program(program)("one", folder)
    torch.set_num_threads(threads)
    return records


def _program(name: str) -> Callable[[str, Path], dict[str, Record]]:
    return getattr(fits if hasattr(fits, name) else joint_fits, name)


def start_group(command: list[str], folder: Path, world_size: int = 2) -> None:
    """Run a module and its arguments in several processes, their output in <folder>/rank<r>.log.

    Raises:
        RuntimeError: a process failed or the group took too long; all of its processes are gone by then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCHELASTIC_RUN_ID": "tests",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs.fits", "tests.runs.joint_fits"])
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_run_module, args=(command, environment, folder / f"rank{rank}.log"))
        process.start()
        processes.append(process)
    try:
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    if any(process.exitcode for process in processes):
        logs = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world_size)]
        codes = [process.exitcode for process in processes]
        raise RuntimeError(f"{command}: exit codes {codes}\n" + "\n--- next rank\n".join(logs))


def _run_module(command: list[str], environment: dict[str, str], log: Path) -> None:
    """What `python -m` with these arguments would do, in a process that is forked already."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _wait(processes: Sequence[BaseProcess]) -> None:
    """Until all have ended, one has failed, or the time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.1)


def main(program: str, kind: str, folder: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # also where nobody is left to kill this process
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    records = _program(program)(kind, folder)
    torch.save(records, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
