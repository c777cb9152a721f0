"""Files of a run that are damaged, of another version or the user's own: one sentence, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moa_lightning.errors import UserError
from moa_lightning.reports.command import make_report, report_command
from moa_lightning.reports.content import Code, Picture
from tests.experiments.conftest import Ablate

LAYER = {"entropy": 0.5, "entropy_by_class": {"digits": 0.25}}
FILES = {
    "config.yaml": "seed_everything: 0\n",
    "metrics.csv": "step,samples,tokens,flops,seconds,train/loss,val/loss\n5,40,,5e3,1.5,0.9,\n10,80,,1e4,3.0,,0.8\n",
    "result.json": json.dumps({"task": "MAE", "parameters": 1000, "seconds": 3.0, "metrics": {"val/loss": 0.8}}),
    "test.json": json.dumps({"metrics": {"test/loss": 0.7}}),
    "environment.json": json.dumps([{"commit": "abc", "device": "a CPU", "command": ["moa", "fit"]}]),
    "mixing.json": json.dumps({"step": 10, "layers": {"block00/up": LAYER}}),
    "held_gates.json": json.dumps({"trained": {"val/loss": 0.8}, "held": {"val/loss": 0.9}}),
    "pruning.json": json.dumps({"density": {"net.blocks.0.up.weight": 0.5}}),
    "samples/sample-step000010.txt": "words",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_run_is_reported_on_while_its_files_are_whole(run: Path) -> None:
    report, _ = make_report(run)
    assert report.lead == "MAE, 1,000 trained parameters; finished after 0:03 of training, at step 10."
    assert {section.title for section in report.sections} >= {
        "Curves",
        "What pruning left",
        "What the mix learned",
        "Where it ran",
    }


def test_curves_stand_against_everything_that_was_counted(run: Path) -> None:
    def captions() -> list[str]:
        curves = next(section for section in make_report(run)[0].sections if section.title == "Curves")
        return [block.caption for block in curves.blocks if isinstance(block, Picture)]

    assert captions() == [
        "All logged metrics against optimiser steps",
        "Losses and validation metrics against samples, FLOPs and seconds of training",
    ]
    (run / "metrics.csv").write_text("step,samples,tokens,flops,seconds,val/loss\n5,4,40,,1,0.9\n6,8,80,,2,0.8\n")
    assert captions()[1] == "Losses and validation metrics against tokens and seconds of training", "not samples too"
    (run / "metrics.csv").write_text("step,samples,tokens,flops,seconds,val/loss\n5,4,40,5,1,0.9\n")
    assert len(captions()) == 1, "a single point is no curve"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"task: \xff\n"),
        ("metrics.csv", b"step,val/loss\n1,\xe9\n"),
        ("metrics.csv", b"step,val/loss\n1,low\n"),
        ("result.json", b'{"task": "MAE", "parameters": 1000}'),
        ("result.json", b'{"task": "MAE", "parameters": null, "seconds": 3}'),
        ("result.json", b"{}"),
        ("result.json", b"[1]"),
        ("test.json", b'{"metrics": null}'),
        ("test.json", b"{}"),
        ("environment.json", b'["abc"]'),
        ("environment.json", b'[{"data": "mnist"}]'),
        ("mixing.json", b"{}"),
        ("mixing.json", b'{"step": 1, "layers": {"a": {}}}'),
        ("mixing.json", b'{"step": 1, "layers": {"a": {"entropy": "low", "entropy_by_class": {}}}}'),
        ("held_gates.json", b"{}"),
        ("held_gates.json", b'{"trained": {"val/loss": 1.0}, "held": null}'),
        ("pruning.json", b"{}"),
        ("pruning.json", b'{"density": {"a": "half"}}'),
        ("samples/sample-step000010.txt", b"caf\xe9"),
    ],
)
def test_a_damaged_file_is_named_in_one_sentence(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(UserError) as found:
        report_command([str(run)])
    message = str(found.value)
    assert str(run / name) in message
    assert "move it away" in message or "remove it" in message
    assert "\n" not in message


def test_what_lies_beside_samples_and_pictures_is_not_ours(run: Path) -> None:
    """Names without a step are the user's own; the latest step is that of the largest number."""
    for name in ("notes.txt", "notes-step.txt", "sample-step9.txt", "sample-stepwise.txt", "sample-step1000000.txt"):
        (run / "samples" / name).write_bytes(b"caf\xe9" if "1000000" not in name else b"the last")
    (run / "pictures").mkdir()
    (run / "pictures/mine.png").write_bytes(b"x")
    (run / "pictures/attention-step000010.png").write_bytes(b"x")
    blocks = [block for section in make_report(run)[0].sections for block in section.blocks]
    titles = [block.title for block in blocks if isinstance(block, Code) and block.title != "config.yaml"]
    assert titles == ["sample at step 1,000,000", "command"]
    names = [block.name for block in blocks if isinstance(block, Picture) and block.kind == "png"]
    assert names == ["attention-step000010"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("language/la/seed1/result.json", '{"metrics": {"val/loss": 1.0}}'),
        ("language/la/seed1/result.json", '{"metrics": {"val/loss": 1.0}, "parameters": "many", "seconds": 1}'),
        ("language/la/seed1/metrics.csv", "step,val/loss\n1,\x00\n"),
        ("language/la/seed1/mixing.json", "{}"),
        ("language/la/seed1/held_gates.json", "{}"),
        ("language/la/seed1/environment.json", '["abc"]'),
        ("language/la/seed1/run.json", "[]"),
        (".grid/seeds.json", "{}"),
    ],
)
def test_a_damaged_file_of_a_grid_too(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path, name: str, content: str
) -> None:
    assert ablate(make_grid(seeds=[0, 1], overrides={"steps": 2})).status == 0
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(UserError) as found:
        make_report(tmp_path / "out")
    assert name in str(found.value)
    assert "\n" not in str(found.value)


def test_a_record_without_a_fingerprint_is_another_configuration(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path
) -> None:
    assert ablate(make_grid(seeds=[0, 1], overrides={"steps": 2})).status == 0
    (tmp_path / "out/language/la/seed1/run.json").write_text('{"fingerprint": null}')
    assert "1 runs were made with another configuration" in make_report(tmp_path / "out")[0].lead
