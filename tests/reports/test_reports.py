"""Reports of runs and grids: what is in them, that a page needs nothing else, and that names cannot break it."""

import csv
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moa_lightning.errors import UserError
from moa_lightning.experiments.grid import Grid, GridTask, GridVariant, Seeds
from moa_lightning.experiments.grid_file import load_grid
from moa_lightning.experiments.state import Result
from moa_lightning.reports import html, markdown
from moa_lightning.reports.command import make_report, report_command, write_report
from moa_lightning.reports.content import Code, Picture, Report, Section, Table, Text
from moa_lightning.reports.scaling import scaling_sections
from tests.cli.conftest import Moa
from tests.experiments.conftest import Ablate

EVIL = "<script>alert('x')</script> | `code` *star* [link](http://x)"


class Page(HTMLParser):
    """Tags and links of a page; asserts that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*blocks: Text | Table | Picture | Code) -> Report:
    return Report("a title", "a lead", [Section("one", list(blocks))])


def test_the_page_stands_alone_and_escapes_everything() -> None:
    report = page_of(
        Text(EVIL), Table((EVIL,), [[EVIL], ["better"]], EVIL), Picture("p", b"\x89PNG", "png", EVIL), Code(EVIL, EVIL)
    )
    page = Page(html.render(report))
    assert "script" not in page.tags
    assert page.text.count(EVIL) == 7, "paragraph, heading, cell, note, caption, summary, text"
    assert all(address.startswith(("data:", "#")) for address in page.addresses), "no network"


def test_markdown_keeps_text_as_text(tmp_path: Path) -> None:
    report = page_of(Text(EVIL), Table(("a", "b"), [[EVIL, "1"]]), Picture("p", b"x", "svg", "c"), Code("t", "a ``` b"))
    markdown.write(report, tmp_path / "report.md", tmp_path / "report")
    text = (tmp_path / "report.md").read_text()
    assert "<script>" not in text.replace(r"\<script\>", "")
    row = next(line for line in text.splitlines() if r"\| \`code\`" in line and line.startswith("|"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3, "a bar in a cell opens no column"
    assert "````\na ``` b\n````" in text
    assert (tmp_path / "report/p.svg").read_bytes() == b"x"
    assert "(report/p.svg)" in text


def test_a_run_that_goes_on_and_a_finished_one(moa: Moa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = (
        "fit -c configs/vision/mae_tiny.yaml -c configs/data/mnist5k.yaml -c configs/ffn/moa.yaml "
        "--model.backbone_args.depth 1 --model.backbone_args.embed_dim 16 --model.backbone_args.num_heads 2 "
        "--data.batch_size 8 --data.bank_size 16 --data.max_val_samples 8 --trainer.max_steps 4 "
        "--trainer.val_check_interval 2 --trainer.log_every_n_steps 1 --trainer.accelerator cpu --run_dir run"
    )
    outcome = moa(command)
    assert outcome.code == 0, outcome.err
    report, folder = make_report(Path("run"))
    assert folder == Path("run")
    assert "MAE" in report.lead
    assert "finished" in report.lead
    page = Page(html.render(report))
    for words_ in (
        "val/loss",
        "reconstruction at step 4",
        "like colours are like features",
        "mixing curves at step 4",
        "embed_dim",
        "torch 2",
        "sha256",
    ):
        assert words_ in page.text, words_
    curves = next(b for s in report.sections for b in s.blocks if isinstance(b, Picture) and b.name == "curves")
    ElementTree.fromstring(curves.content)

    (Path("run") / "result.json").unlink()
    with (Path("run") / "metrics.csv").open("a") as file:
        file.write("5,40,")  # half a line
    report, _ = make_report(Path("run"))
    assert "not finished, at step 4" in report.lead
    assert [path.name for path in write_report(report, Path("run"))] == ["report.html", "report.md"]


def test_a_grid_says_what_its_table_says(ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path) -> None:
    done = ablate(make_grid())
    assert done.status == 0, done.output
    assert f"{tmp_path}/out/report.html" in done.output
    page = Page((tmp_path / "out/report.html").read_text())
    for row in csv.DictReader((tmp_path / "out/table.csv").open()):
        assert row["verdict"] in page.text
    assert "of 4 comparisons: 4 better" in page.text
    text = (tmp_path / "out/report.md").read_text()
    links = re.findall(r"\]\((report/[^)]+)\)", text)
    assert links
    assert all((tmp_path / "out" / link).is_file() for link in links)
    (tmp_path / "grid.yaml").unlink()
    report, folder = make_report(tmp_path / "out")  # from its folder alone, which may have been moved
    assert folder == tmp_path / "out"
    assert "All runs have finished" in report.lead
    for result in folder.rglob("result.json"):
        result.unlink()
    assert "of 4 comparisons: none judged yet" in make_report(folder)[0].lead


def test_a_report_has_the_seeds_and_the_files_of_the_command(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path
) -> None:
    assert ablate(make_grid(seeds=[0]), "--seeds", "0,1,2").status == 0
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert {row["n"] for row in rows} == {"3"}
    assert "All runs have finished; of 4 comparisons: 4 better" in make_report(tmp_path / "out")[0].lead
    (tmp_path / "moa.yaml").write_text("quality: 0.3\n")  # since then
    lead = make_report(tmp_path / "out")[0].lead
    assert "12 of 18 runs have finished; of 4 comparisons: 2 better" in lead
    assert lead.endswith("6 runs were made with another configuration and are left out.")


def test_a_good_report_is_not_replaced_by_one_of_nothing(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path
) -> None:
    assert ablate(make_grid()).status == 0
    before = (tmp_path / "out/report.md").read_text()
    (tmp_path / "task.yaml").write_text("other: 1\n")  # all runs have it
    with pytest.raises(UserError, match=r"18 were made with another one \(first: .*seed0, different in .*task.yaml\)"):
        report_command([str(tmp_path / "out")])
    assert (tmp_path / "out/report.md").read_text() == before


@pytest.mark.parametrize("place", ["overrides", "tune"])
def test_a_report_imports_no_module_that_was_not_named(
    make_grid: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """A budget of a net that nobody has measured: measuring it would run the module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    tune = {"seeds": [100], "options": {"rate": [1, 2]}, "overrides": {"import": "mine"}}
    entries = {"overrides": {"import": "mine"}} if place == "overrides" else {"overrides": {}, "tune": tune}
    path = make_grid(budget={"tokens": 1e6}, **entries)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"'mine' would be imported, which runs its code; .* add --import mine"):
        report_command([str(path)])
    assert not (tmp_path / "imported").exists()
    with pytest.raises(UserError):  # no net that could be measured
        report_command([str(path), "--import", "mine"])
    assert (tmp_path / "imported").exists()


def test_a_target_is_judged_by_the_speed_run_rule(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path
) -> None:
    """gelu's losses at step 6 are 4/7 plus up to 0.01; la's are lower by 0.1 and more."""
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    assert ablate(make_grid(tasks={"t": {**task, "target": 0.55, "target_sd": 0.02}})).status == 0
    lines = (tmp_path / "out/report.md").read_text().splitlines()
    begin = lines.index("val/loss ≤ 0.55")
    ends = {line.split(" | ")[0].lstrip("| "): line.split(" | ")[-1].rstrip(" |") for line in lines[begin : begin + 8]}
    assert ends["gelu"] == "not shown"
    assert ends["la"].startswith("reached")
    page = "\n".join(lines)
    assert "What a variant needed until val/loss first came to 0.55, mean over its runs that did not diverge" in page
    needed = [line.strip("| ").split(" | ") for line in lines if line.endswith(" of 3 |")]
    gelu = next(cells for cells in needed if cells[0] == "gelu")
    assert gelu == ["gelu", "at least 6", "at least 48", "at least 3", "0 of 3"], "steps, samples, seconds"
    (la,) = (cells for cells in needed if cells[0] == "la" and len(cells) == 5)
    assert la[-1] == "3 of 3"
    assert 4 < float(la[1]) < 6, "between the validations at step 4 and 6"
    assert float(la[3]) == pytest.approx(float(la[1]) / 2, rel=0.01), "half a second a step"
    tested = {"language": {**task, "target": 0.55, "test_metric": "test/loss"}}
    assert ablate(make_grid(tasks=tested, out=str(tmp_path / "tested"))).status == 0
    assert "No time to the target: test/loss is measured once" in (tmp_path / "tested/report.md").read_text()
    assert "at least 0.0615, for a standard deviation of one run of 0.02" in " ".join(lines)
    with pytest.raises(UserError, match="task t has target 'soon'; give a value of val/loss"):
        load_grid(make_grid(tasks={"t": {**task, "target": "soon"}}), Path)


def test_fits_along_budgets_and_apart_for_other_axes() -> None:
    tokens, rng = (1e5, 3e5, 1e6, 3e6), np.random.default_rng(0)
    tasks = tuple(
        GridTask(f"t-{i}-{o}", (), "val/loss", "min", axes={"budget": str(i), "optimizer": o}, base="t")
        for i in range(4)
        for o in ("adamw", "muon")
    )
    grid = Grid("g", Path("out"), Seeds((0, 1), 2), "gelu", tasks, (GridVariant("gelu", ()),), {}, 1)
    results = {}
    for task in tasks:
        size, floor = tokens[int(task.axes["budget"])], {"adamw": 2.0, "muon": 1.0}[task.axes["optimizer"]]
        for seed in (0, 1):
            loss = floor + 30 * size**-0.3 + 1e-4 * rng.standard_normal()
            run = grid.run(task, grid.variants[0], seed, {})
            results[run] = Result({"val/loss": loss}, 1000, 10, 10, int(size), 1.0)
    sections = scaling_sections(grid, results)
    assert [section.title for section in sections] == [
        "t-budget, optimizer adamw: loss and tokens",
        "t-budget, optimizer muon: loss and tokens",
    ]
    for section, floor in zip(sections, (2.0, 1.0), strict=True):
        table = next(block for block in section.blocks if isinstance(block, Table))
        assert float(table.rows[0][1].split()[0]) == pytest.approx(floor, abs=0.1)
        scale, low, high = (float(word.strip("[],")) for word in table.rows[0][2].split())
        assert scale == pytest.approx(30, rel=0.1)
        assert low < scale < high


@pytest.mark.parametrize("diverge", ["", "true"], ids=["a value of 0", "all diverged"])
def test_tuned_values_without_a_basin_are_only_drawn(
    ablate: Ablate, make_grid: Callable[..., Path], tmp_path: Path, diverge: str
) -> None:
    task = {"config": [str(tmp_path / "task.yaml")], "metric": "val/loss", "mode": "min"}
    values = [0.001, 0.002, 0.004] if diverge else [0.0, 0.001, 0.002]
    path = make_grid(
        tasks={"t": task},
        tune={"seeds": [100], "options": {"step_seconds": values}, "overrides": {"diverge": diverge}},
        overrides={"steps": 4},
        seeds=[0, 1],
    )
    done = ablate(path)
    assert done.status == 0, done.output
    page = (tmp_path / "out/report.md").read_text()
    assert "t-step_seconds" in page
    assert "basin" not in page


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds neither a run"):
        report_command([str(tmp_path)])


def test_scaling_needs_four_sizes_and_finds_what_was_planted() -> None:
    sizes, rng = (1e5, 3e5, 1e6, 3e6, 1e7), np.random.default_rng(0)
    variants = (GridVariant("gelu", ()), GridVariant("moa", ()))
    tasks = tuple(GridTask(f"t-{i}", (), "val/loss", "min", axes={"size": str(i)}, base="t") for i in range(5))
    grid = Grid("g", Path("out"), Seeds((0, 1), 2), "gelu", tasks, variants, {}, 1)
    results = {}
    for task, size in zip(tasks, sizes, strict=True):
        for variant, gain in zip(variants, (1.0, 1.5), strict=True):  # moa acts as if it were 1.5 times as large
            for seed in (0, 1):
                loss = 2.0 + 30 * (gain * size) ** -0.3 + 1e-4 * rng.standard_normal()
                run = grid.run(task, variant, seed, {})
                results[run] = Result({"val/loss": loss}, int(size), 10, 10, None, 1.0)
    (section,) = scaling_sections(grid, results)
    assert section.title == "t-size: loss and parameters"
    table = next(block for block in section.blocks if isinstance(block, Table) and "multiplier" in block.headings)
    found = [float(row[3].split()[0]) for row in table.rows]
    assert found == pytest.approx([1.5] * 5, rel=0.05)
    one_seed = {run: result for run, result in results.items() if run.seed == 0 and run.task != "t-4"}
    assert scaling_sections(grid, one_seed) == [], "four runs do not make a fit"
    few = {run: result for run, result in results.items() if run.task in ("t-0", "t-1", "t-2")}
    assert scaling_sections(grid, few) == []
    diverged = dict.fromkeys([next(iter(results))], Result({"val/loss": math.nan}, None, None, None, None, math.nan))
    assert "multiplier" not in json.dumps(
        [str(block) for block in scaling_sections(grid, results | diverged)[0].blocks][3:]
    )
