"""The tasks of GLUE and SuperGLUE as their published files hold them, with the official scores of each.

GLUE (Wang et al., arXiv 1804.07461): tables. CoLA's have no header but for its test file; QQP's have lines that a line
feed in a question broke, which every reader leaves out; quotes mean nothing; MRPC comes as train.tsv and dev.tsv, or as
Microsoft's msr_paraphrase_train.txt, which dev_ids.tsv splits; STS-B's scores are numbers from 0 to 5; MNLI has two
validation sets, from the training genres (mnli) and from others (mnli_mm). SuperGLUE (arXiv 1905.00537): JSON lines;
MultiRC and ReCoRD are left out, whose scores are over groups of answers. Validation is what both call dev. Their test
files have no labels, so they serve prediction only.

`EXPERT_CHOICE` are the eleven tasks of Zhou et al. (arXiv 2202.09368), where experts choose.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.labelled_text import Row
from data.rows import Record, class_of, number_of, read_records, text_of
from moa_lightning.errors import UserError

EXPERT_CHOICE = ("boolq", "cb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wic", "wnli")

BINARY, ENTAILED = ("0", "1"), ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
TABLES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
MSR_TRAIN, MSR_TEST, DEV_IDS = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"  # MRPC's
LINES = {"train": "train.jsonl", "val": "val.jsonl", "test": "test.jsonl"}


@dataclass(frozen=True)
class Benchmark:
    """A task and where its files have what."""

    folder: str
    texts: tuple[str, ...]
    """columns or fields, in the order in which the net reads them"""
    label: str
    classes: tuple[str, ...]
    """none: the label is a number"""
    metrics: tuple[str, ...] = ("accuracy",)
    """official ones; where there are several, their mean ranks"""
    files: tuple[tuple[str, str], ...] = tuple(TABLES.items())
    """split and file"""
    columns: tuple[str, ...] | None = None
    """of files without a header"""
    broken_lines: bool = False
    """whether lines of too few cells are left out"""


def _lines(folder: str, texts: tuple[str, ...], classes: tuple[str, ...], *metrics: str) -> Benchmark:
    """A task of SuperGLUE."""
    return Benchmark(folder, texts, "label", classes, metrics or ("accuracy",), tuple(LINES.items()))


def _mnli(kind: str) -> Benchmark:
    files = (("train", "train.tsv"), ("val", f"dev_{kind}.tsv"), ("test", f"test_{kind}.tsv"))
    return Benchmark("MNLI", ("sentence1", "sentence2"), "gold_label", INFERENCE, files=files)


BENCHMARKS = {
    "cola": Benchmark(
        "CoLA", ("sentence",), "label", BINARY, ("matthews",), columns=("source", "label", "star", "sentence")
    ),
    "sst2": Benchmark("SST-2", ("sentence",), "label", BINARY),
    "mrpc": Benchmark("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("accuracy", "f1")),
    "stsb": Benchmark("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
    "qqp": Benchmark("QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "f1"), broken_lines=True),
    "mnli": _mnli("matched"),
    "mnli_mm": _mnli("mismatched"),
    "qnli": Benchmark("QNLI", ("question", "sentence"), "label", ENTAILED),
    "rte": Benchmark("RTE", ("sentence1", "sentence2"), "label", ENTAILED),
    "wnli": Benchmark("WNLI", ("sentence1", "sentence2"), "label", BINARY),
    "boolq": _lines("BoolQ", ("question", "passage"), ("false", "true")),
    "cb": _lines("CB", ("premise", "hypothesis"), ("entailment", "contradiction", "neutral"), "accuracy", "macro_f1"),
    "copa": _lines("COPA", ("question", "premise", "choice1", "choice2"), BINARY),
    "wic": _lines("WiC", ("word", "sentence1", "sentence2"), ("false", "true")),
    "wsc": _lines("WSC", ("target.span1_text", "target.span2_text", "text"), ("false", "true")),
}


def read_benchmark(name: str, folder: str | None) -> dict[str, list[Row]]:
    """The splits of a task; "test" only where its file is there.

    Args:
        folder: below which the published files lie (CoLA/train.tsv, BoolQ/train.jsonl).

    Raises:
        UserError: a file is missing, or has other content.
    """
    task = BENCHMARKS[name]
    if folder is None:
        first = f"{task.folder}/{task.files[0][1]}"
        raise UserError(f"data.task {name} is read from files: name the folder that holds {first} in data.folder")
    place = Path(folder).expanduser() / task.folder
    if name == "mrpc" and not (place / "train.tsv").exists() and (place / MSR_TRAIN).exists():
        return _microsoft(task, place)
    splits = {}
    for split, file in task.files:
        path = place / file
        if path.exists():
            columns = None if split == "test" else task.columns
            splits[split] = _rows(task, read_records(path, columns, task.broken_lines))
        elif split != "test":
            raise UserError(f"data.task {name} needs '{path}', which is not there: put the published file there")
    return splits


def _rows(task: Benchmark, records: Iterable[Record]) -> list[Row]:
    return [_row(task, record) for record in records]


def _row(task: Benchmark, record: Record) -> Row:
    texts = tuple(text_of(record, field) for field in task.texts)
    label = class_of(record, task.label, task.classes) if task.classes else number_of(record, task.label)
    return Row(texts, label)


def _microsoft(task: Benchmark, place: Path) -> dict[str, list[Row]]:
    """MRPC from Microsoft's files, whose test part has labels, with GLUE's split of the training part."""
    if not (place / DEV_IDS).exists():
        raise UserError(f"data.task mrpc needs '{place / DEV_IDS}' beside {MSR_TRAIN}: put GLUE's file there")
    held_out = {tuple(record.values.values()) for record in read_records(place / DEV_IDS, ("#1 ID", "#2 ID"))}
    parts: dict[str, list[Row]] = {"train": [], "val": []}
    for record in read_records(place / MSR_TRAIN):
        ids = (text_of(record, "#1 ID"), text_of(record, "#2 ID"))
        parts["val" if ids in held_out else "train"].append(_row(task, record))
    if not parts["val"]:
        raise UserError(f"'{place / DEV_IDS}' names no pair of {MSR_TRAIN} to validate on: put GLUE's file there")
    if (place / MSR_TEST).exists():
        parts["test"] = _rows(task, read_records(place / MSR_TEST))
    return parts
