"""A few of the kills of `make soak`: alone, and sharded over two processes."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from .kills import Case, differences, finish, trial


@pytest.mark.parametrize(("case", "kills"), [(Case("language", "one", workers=1), 2), (Case("mae", "fsdp"), 1)])
def test_a_killed_run_ends_as_one_that_nobody_touched(case: Case, kills: int, tmp_path: Path) -> None:
    how = trial(case, kills, tmp_path / "trial", tmp_path, random.Random(str(case)))
    assert len(how) == kills


def test_another_run_is_noticed(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    finish(Case("language", "one"), a, tmp_path)
    shutil.copytree(a, b, symlinks=True)
    assert list(differences(a, b)) == []
    lines = (b / "ids-rank0.txt").read_text().splitlines()
    (b / "ids-rank0.txt").write_text("\n".join([*lines[:-1], "39 1 2 3"]))
    table = (b / "metrics.csv").read_text()
    (b / "metrics.csv").write_text(table[: table.rindex("\n", 0, -1) + 1])
    path = b / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["net.head.weight"][0, 0] += 1e-7
    torch.save(checkpoint, path)
    weights, *files = differences(a, b)
    assert weights == "state_dict of the last checkpoint"
    assert files == ["ids-rank0.txt: batches lost", "ids-rank0.txt: other batches", "metrics.csv"]
