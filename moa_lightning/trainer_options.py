"""What the Trainer's options mean here where Lightning's own meaning surprises: length, rhythm of validation, devices.

Checked before anything is built, so that a slip ends in a sentence and not in a hundred processes.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

from .errors import UserError

VALIDATIONS = 10  # in a run that does not say how often
PROCESSES_PER_CORE = 4


def check_devices(config: Mapping[str, Any]) -> None:
    """Raise UserError for devices that are not there, and for more CPU processes than make sense.

    Lightning would start any number of processes on a CPU.
    """
    accelerator, devices = config["accelerator"], str(config["devices"])
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not gpus and not torch.backends.mps.is_available():
        raise UserError(f"trainer.accelerator is {accelerator}, and torch finds no GPU here; choose cpu or auto")
    if not devices.isdigit():
        return
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not gpus)
    cores = os.cpu_count() or 1
    there, most = (f"{cores} CPU cores", PROCESSES_PER_CORE * cores) if on_cpu else (f"{gpus} GPUs", gpus)
    known = on_cpu or accelerator in ("gpu", "cuda", "auto")
    if int(devices) < 1 or (known and int(devices) > most > 0):
        raise UserError(f"trainer.devices is {devices}, and this machine has {there}; choose from 1 to {most}")


def check_length(config: Mapping[str, Any]) -> None:
    """Raise UserError unless the run has an end, and its counts are counts."""
    if config["fast_dev_run"]:
        return
    limits = {name: config[name] for name in ("max_steps", "max_epochs")}
    for name, least in (*((name, 1) for name in limits), ("accumulate_grad_batches", 1), ("log_every_n_steps", 0)):
        value = config[name]
        if value is not None and value < least and not (name in limits and value == -1):
            raise UserError(f"trainer.{name} is {value}; give a whole number of at least {least}")
    if (config["gradient_clip_val"] or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val is {config['gradient_clip_val']}; give a number of at least 0")
    if config["max_time"] is None and all(value in (None, -1) for value in limits.values()):
        raise UserError("the run has no end: give --trainer.max_steps, --trainer.max_epochs or --trainer.max_time")


def validation_rhythm(config: Mapping[str, Any]) -> tuple[int | None, dict[str, Any]]:
    """How often to validate: optimiser steps (None: as Lightning does by itself), and options for the Trainer.

    A whole `val_check_interval` counts optimiser steps, a fraction is of an epoch. Without one there are ten
    validations in `max_steps`, or one an epoch.
    """
    interval, every_n_epochs = config["val_check_interval"], config["check_val_every_n_epoch"]
    if interval is None and config["max_steps"] > 0 and every_n_epochs is None:
        interval = math.ceil(config["max_steps"] / VALIDATIONS)
    if isinstance(interval, int) and every_n_epochs is None:
        if interval < 1:
            raise UserError(f"trainer.val_check_interval is {interval}; give steps, 1 or more, or a share of an epoch")
        return interval, {"val_check_interval": interval * config["accumulate_grad_batches"]}
    if interval is None or isinstance(interval, float):
        return None, {"val_check_interval": interval or 1.0, "check_val_every_n_epoch": every_n_epochs or 1}
    return None, {}
