"""metrics.csv and event files cut back to a checkpoint."""

import csv

import pytest
from torch.utils.tensorboard import SummaryWriter

from moa_lightning.callbacks.files import MetricsTable, cut_event_files, write_json

from .toy import events


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(step, **metrics):
    return {"step": step, "samples": 4 * step, "tokens": None, "flops": 1e9 * step, "seconds": 0.5 * step, **metrics}


def test_a_new_metric_becomes_a_column(tmp_path):
    table = MetricsTable(tmp_path / "metrics.csv", last_step=0)
    table.append(row(1, loss=0.1 + 0.2))
    table.append(row(2, accuracy=0.5))
    assert rows(tmp_path / "metrics.csv") == [
        {
            "step": "1",
            "samples": "4",
            "tokens": "",
            "flops": "1000000000.0",
            "seconds": "0.5",
            "loss": "0.30000000000000004",
            "accuracy": "",
        },
        {
            "step": "2",
            "samples": "8",
            "tokens": "",
            "flops": "2000000000.0",
            "seconds": "1.0",
            "loss": "",
            "accuracy": "0.5",
        },
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_reopening_drops_later_rows_and_half_a_row(tmp_path):
    path = tmp_path / "metrics.csv"
    table = MetricsTable(path, last_step=0)
    for step in (1, 2, 3):
        table.append(row(step, loss=1.0))
    with path.open("a") as file:
        file.write("1,4")  # a process killed while it wrote
    again = MetricsTable(path, last_step=2)
    again.append(row(3, loss=9.0))
    assert [(r["step"], r["loss"]) for r in rows(path)] == [("1", "1.0"), ("2", "1.0"), ("3", "9.0")]


def test_a_fresh_run_starts_an_empty_table(tmp_path):
    MetricsTable(tmp_path / "metrics.csv", last_step=0).append(row(1, loss=1.0))
    MetricsTable(tmp_path / "metrics.csv", last_step=0)
    assert rows(tmp_path / "metrics.csv") == []


def test_json_replaces_the_file_as_a_whole(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert (tmp_path / "a.json").read_text() == "old"
    write_json(tmp_path / "a.json", {"good": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "good": null\n}\n'


@pytest.fixture
def event_folder(tmp_path):
    """Six steps of four samples: on each, the axes of samples and tokens, then the loss as Lightning counts steps."""
    writer = SummaryWriter(str(tmp_path))
    for step in range(1, 7):
        writer.add_scalar("loss_vs_samples", step, step * 4)
        writer.add_scalar("loss_vs_tokens", step, step * 400)
        writer.add_scalar("loss_vs_megaflops", step, step * 4000)
        writer.add_scalar("loss_vs_seconds", step, step // 3)
        writer.add_scalar("loss", step, step - 1)
    writer.close()
    return tmp_path


def test_events_past_the_checkpoint_are_cut_on_every_axis(event_folder):
    cut_event_files(event_folder, step=4, samples=16)
    for tag in ("loss", "loss_vs_samples", "loss_vs_tokens", "loss_vs_megaflops", "loss_vs_seconds"):
        assert [event.value for event in events(event_folder).Scalars(tag)] == [1, 2, 3, 4]


def test_a_checkpoint_at_the_end_cuts_nothing(event_folder):
    (path,) = event_folder.glob("events*")
    before = path.read_bytes()
    cut_event_files(event_folder, step=6, samples=24)
    assert path.read_bytes() == before


def test_a_torn_last_event_is_no_obstacle(event_folder):
    (path,) = event_folder.glob("events*")
    path.write_bytes(path.read_bytes()[:-5])
    cut_event_files(event_folder, step=2, samples=8)
    assert [event.value for event in events(event_folder).Scalars("loss")] == [1, 2]
