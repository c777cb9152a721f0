"""A few of the kills of `make soak`: alone, and sharded over two processes."""

import random
from pathlib import Path

import pytest

from .kills import Case, differences, finish, trial


@pytest.mark.parametrize("case", [Case("language", "one", workers=1), Case("mae", "fsdp")], ids=str)
def test_a_killed_run_ends_as_one_that_nobody_touched(case: Case, tmp_path: Path) -> None:
    how = trial(case, 3, tmp_path / "trial", tmp_path, random.Random(str(case)))
    assert len(how) == 3


def test_another_run_is_noticed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        finish(Case("language", "one"), tmp_path / name, tmp_path)
    assert list(differences(tmp_path / "a", tmp_path / "b")) == []
    lines = (tmp_path / "b" / "ids-rank0.txt").read_text().splitlines()
    (tmp_path / "b" / "ids-rank0.txt").write_text("\n".join([*lines[:-1], "39 1 2 3"]))
    table = (tmp_path / "b" / "metrics.csv").read_text()
    (tmp_path / "b" / "metrics.csv").write_text(table[: table.rindex("\n", 0, -1) + 1])
    found = list(differences(tmp_path / "a", tmp_path / "b"))
    assert found == ["ids-rank0.txt: batches lost", "ids-rank0.txt: other batches", "metrics.csv"]
