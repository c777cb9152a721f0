"""What a checkpoint says of other checkpoints is believed only where it can be true."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moa_lightning.callbacks.checkpoint import RunCheckpoint
from moa_lightning.errors import UserError


def state(callback: RunCheckpoint, **entries: Any) -> dict[str, Any]:
    return {**callback.state_dict(), **entries}


@pytest.mark.parametrize("latest", [None, "step1.ckpt", [3], ["../step1.ckpt"], [".."], ["notes.txt"]])
def test_a_list_of_names_that_is_none_is_refused(latest: Any, tmp_path: Path) -> None:
    callback = RunCheckpoint(dirpath=tmp_path)
    with pytest.raises(UserError, match="list of kept checkpoints"):
        callback.load_state_dict(state(callback, latest=latest))
    callback.load_state_dict(state(callback, latest=["step0000001.ckpt"]))
    assert callback.latest == ["step0000001.ckpt"]


@pytest.mark.parametrize("place", ["elsewhere/step1.ckpt", "run/notes.txt", "run/step1.ckpt"])
def test_only_checkpoints_of_its_own_folder_are_removed(place: str, tmp_path: Path) -> None:
    removed: list[str] = []
    trainer = SimpleNamespace(strategy=SimpleNamespace(remove_checkpoint=removed.append))
    callback = RunCheckpoint(dirpath=tmp_path / "run")
    callback._remove_checkpoint(trainer, str(tmp_path / place))
    assert removed == ([str(tmp_path / place)] if place == "run/step1.ckpt" else [])
