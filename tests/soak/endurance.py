"""A run of half an hour must not grow: memory and open files stay flat once it is warm.

`python -m tests.soak.endurance --minutes 30` runs a small MAE with loader workers, validations, pictures, checkpoints
and TensorBoard, looks at its processes every few seconds, and compares the end with the time after the warm-up. Python
and the allocator breathe, so medians over a tenth of the time are compared.
"""

import argparse
import shutil
import time
from pathlib import Path
from statistics import median

from .kills import Case, Run

WARM_UP, WINDOW = 1 / 6, 1 / 10  # shares of the time
TOLERANCE = 0.01
EVERY_SECONDS = 5.0


def resources(pid: int) -> tuple[int, int, int]:
    """Resident memory (bytes) of a process and, apart, of its children, and its open files."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (
        _resident(pid),
        sum(_resident(int(child)) for child in children),
        len(list(Path(f"/proc/{pid}/fd").iterdir())),
    )


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    folder = options.folder.absolute() / "endurance"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = Case("mae", "one", workers=2).command(folder / "run", folder)
    command += ["--trainer.max_steps", "-1", "--trainer.max_epochs", "1000000", "--trainer.val_check_interval", "200"]
    command += ["--model.optimizer.schedule", "constant"]
    run, samples, end = Run(command, folder / "run.log"), [], time.monotonic() + 60 * options.minutes
    try:
        while time.monotonic() < end:
            time.sleep(EVERY_SECONDS)
            if run.process.poll() is not None:
                raise RuntimeError(f"the run ended\n{(folder / 'run.log').read_text()[-3000:]}")
            samples.append(resources(run.process.pid))
    finally:
        run.end()
    steps = (folder / "run" / "metrics.csv").read_text().splitlines()[-1].partition(",")[0]
    print(f"{options.minutes:g} minutes, {steps} steps")
    first, width = int(WARM_UP * len(samples)), max(1, int(WINDOW * len(samples)))
    grown = False
    for name, values in zip(("memory", "workers' memory", "open files"), zip(*samples, strict=True), strict=True):
        before, after = median(values[first : first + width]), median(values[-width:])
        grown = grown or after > before * (1 + TOLERANCE)
        print(f"{name}: {before:,.0f} after the warm-up, {after:,.0f} at the end ({after / max(before, 1) - 1:+.2%})")
    raise SystemExit(f"grew by more than {TOLERANCE:.0%}" if grown else 0)


if __name__ == "__main__":
    main()
