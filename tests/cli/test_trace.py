"""One command leaves a trace of training steps."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT, Moa


@pytest.mark.usefixtures("words")
def test_the_trace_fragment_leaves_a_trace_of_operations_in_the_runs_folder(moa: Moa) -> None:
    outcome = moa(f"{TEXT} -c configs/ffn/moa.yaml -c configs/trainer/trace.yaml --run_dir traced")
    assert outcome.code == 0, outcome.err
    (trace,) = Path("traced").glob("*.pt.trace.json")
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("moa::mix") == 3  # one block, three steps
    assert "aten::mm" in names
    assert any("AdamW" in name for name in names)
    assert "AdamW" in (Path("traced") / "fit-trace.txt").read_text()
