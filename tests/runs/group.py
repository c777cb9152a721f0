"""Starts a group of processes for DDP or FSDP2 as torchrun would, one group for all fits, and never waits for ever.

`python -m tests.runs.group PROGRAM KIND FOLDER` is what each process runs; environment variables say which one it is.
"""

import faulthandler
import logging
import os
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from . import fits, joint_fits
from .fits import ROOT, Record

SECONDS = 480  # a group that takes longer hangs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_group(kind: str, folder: Path, world_size: int = 2, program: str = "program") -> list[dict[str, Record]]:
    """Run a program of fits.py or joint_fits.py in several processes; returns the records of each rank.

    Errors as in `start_group`.
    """
    start_group(["tests.runs.group", program, kind, str(folder)], folder, world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


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
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"rank{rank}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
            )
    try:
        _wait(processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        logs = [(folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(world_size)]
        codes = [process.returncode for process in processes]
        raise RuntimeError(f"{command}: exit codes {codes}\n" + "\n--- next rank\n".join(logs))


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, one has failed, or the time is up."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if any(codes) or None not in codes:
            return
        time.sleep(0.1)


def main(program: str, kind: str, folder: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)  # also where nobody is left to kill this process
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    records = getattr(fits if hasattr(fits, program) else joint_fits, program)(kind, folder)
    torch.save(records, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
