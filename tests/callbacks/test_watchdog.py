"""The watchdog's clock: a process that was suspended for longer than the timeout goes on, one that hangs ends."""

import signal
import subprocess
import sys
import time

import pytest

TIMEOUT = 2.0
STEPS = f"""
import time
from types import SimpleNamespace
from moa_lightning.callbacks.watchdog import Watchdog

trainer = SimpleNamespace(global_rank=0, world_size=1, global_step=0)
watchdog = Watchdog({TIMEOUT})
watchdog.on_fit_start(trainer, None)
print("begun", flush=True)
for step in range(6):
    watchdog.on_train_batch_start(trainer)
    time.sleep(PAUSE)
print("done", flush=True)
"""


@pytest.mark.parametrize(("pause", "suspended", "code"), [(0.5, 3 * TIMEOUT, 0), (60, 0.0, 70)])
def test_time_is_that_of_the_process(pause: float, suspended: float, code: int) -> None:
    command = [sys.executable, "-c", STEPS.replace("PAUSE", str(pause))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if suspended:
            time.sleep(0.2)  # into a step, so that its end lies a while behind the awakening
            process.send_signal(signal.SIGSTOP)
            time.sleep(suspended)
            process.send_signal(signal.SIGCONT)
        said, mistakes = process.communicate(timeout=60)
    assert process.returncode == code
    assert said == ("done\n" if code == 0 else "")
    assert ("nothing has moved for 2 s: the process stands in the forward pass of step 1" in mistakes) == (code == 70)
