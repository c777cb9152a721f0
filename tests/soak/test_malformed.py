"""A dozen of the malformed inputs that `python -m tests.soak.malformed` has 300 of, and that it notices faults."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.malformed import verdict_of
from tests.soak.mutations import Payload

ROOT = Path(__file__).parents[2]


def test_a_dozen_malformed_inputs() -> None:
    command = [sys.executable, "-m", "tests.soak.malformed", "--count", "12", "--seed", "7"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all | 12 |" in result.stdout


def test_the_payload_runs_where_it_is_unpickled_and_only_there(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(copy.deepcopy(Payload()))
    assert not Path("canary").exists()
    pickle.loads(content)
    assert Path("canary").exists()


@pytest.mark.parametrize(
    ("code", "printed", "new", "verdict"),
    [
        (0, "done\n", {"run"}, "ran"),
        (2, "moa: no such file\n", set(), "refused"),
        (2, "step 1/3  2/s\nmoa: a.png cannot be decoded\n", {"run"}, "stopped"),
        (2, "moa: no such file\n", {"run"}, "partial output"),
        (2, "moa: one\nmoa: two\n", set(), "more than a sentence"),
        (2, "", set(), "more than a sentence"),
        (70, "Traceback (most recent call last)\n", set(), "traceback"),
        (-11, "", set(), "crash"),
        (None, "", set(), "hang"),
        (0, "", {"canary"}, "executed"),
    ],
)
def testverdict_ofs(code: int | None, printed: str, new: set[str], verdict: str) -> None:
    assert verdict_of(code, printed, {Path(name) for name in new}) == verdict
