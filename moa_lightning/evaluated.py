"""What `moa validate`, `test` and `predict` take from the checkpoint and not from the data at hand.

Options that a run left open were filled in from its own data and stand in the checkpoint. Judging the run on another
set, or on a folder of pictures, must build the same net and show it pixels of the same size and scale, whatever that
set would suggest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint_reading import META, PARTS, VISION, is_joint, read_file
from .errors import UserError

OPEN_DATA = ("image_size", "channels")
PIXELS = "pixels"  # in a checkpoint: mean and std of each channel, with which the run's images were normalised


class Settings(NamedTuple):
    """What a checkpoint says of its run."""

    task: dict[str, Any]
    """the task's hyper-parameters"""
    pixels: dict[str, list[float]]


def settings_of(checkpoint: str) -> Settings:
    """Read a checkpoint, a file or a folder of shards. Errors as in `read_file`."""
    path = Path(checkpoint)
    content = read_file(path / META if path.is_dir() else path)
    kept = content.get(PARTS, {}).get(VISION, content)
    return Settings(content.get("hyper_parameters") or {}, kept.get(PIXELS) or {})


def fill_data(config: Any, settings: Settings) -> None:
    """Give the image data what the config of a data module leaves open, in place; of a joint one to its vision part."""
    options, task = config.get("init_args") or {}, settings.task
    if VISION in options and is_joint(task):
        options, task = options[VISION].get("init_args") or {}, task[VISION]["options"]
    for name in OPEN_DATA:
        if name in options and options[name] is None:
            options[name] = task.get(name)
    for name, values in settings.pixels.items():
        if name in options and options[name] is None and options.get("channels") == len(values):
            options[name] = values


def check_pixels(task: Mapping[str, Any], data: Any) -> None:
    """UserError where the data show a net images of another size or number of channels than it was built for."""
    for name in OPEN_DATA:
        given = getattr(data, name, None)
        if given is not None and task.get(name) not in (None, given):
            raise UserError(
                f"the run was trained with {name} {task[name]}, and data.{name} is {given}; leave data.{name} out"
            )
