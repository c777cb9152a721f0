"""Labelled text by name, from the standard library or the files of GLUE and SuperGLUE, and from files of one's own."""

import difflib
from pathlib import Path
from typing import Any

from data.benchmarks import BENCHMARKS, read_benchmark
from data.labelled_text import LabelledText, Row
from data.rows import class_name, class_of, label_of, number_of, read_records, text_of
from data.stdlib_tasks import STDLIB_TASKS, read_stdlib
from moa_lightning.errors import UserError

DEFAULT_METRICS = {True: ["spearman"], False: ["accuracy"]}  # whether labels are numbers


class TextTask(LabelledText):
    """A task by its name.

    Args:
        task: stdlib_kind, stdlib_next or stdlib_indent (data/stdlib_tasks.py), which are always there; of GLUE cola,
            sst2, mrpc, stsb, qqp, mnli, mnli_mm, qnli, rte, wnli, of SuperGLUE boolq, cb, copa, wic, wsc.
        folder: below which the published files of GLUE and SuperGLUE lie: CoLA/train.tsv, BoolQ/train.jsonl.
        val_fraction: share of the standard library's files for validation. A language model to start from should be
            trained with the same fractions, or it has seen these files.
        test_fraction: the same for testing.
        options: `LabelledText`'s.

    Raises:
        UserError: no such task; in `setup`, missing or damaged files.
    """

    def __init__(
        self,
        task: str = "stdlib_kind",
        folder: str | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        known = [*STDLIB_TASKS, *BENCHMARKS]
        if task not in known:
            near = difflib.get_close_matches(task, known, 1, 0.5)
            raise UserError(
                f"data.task '{task}' is unknown; "
                + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}")
            )
        self.task, self.folder = task, folder
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        definition = STDLIB_TASKS.get(task) or BENCHMARKS[task]
        self.class_names, self.metrics = list(definition.classes), list(definition.metrics)
        self.num_classes = len(self.class_names) or 1

    def read(self) -> dict[str, list[Row]]:
        if self.task in BENCHMARKS:
            return read_benchmark(self.task, self.folder)
        return read_stdlib(self.task, self.val_fraction, self.test_fraction)

    def describe_rows(self) -> dict[str, str | int]:
        names = {"class_names": ", ".join(self.class_names)} if self.class_names else {}
        return {"source": self.task, **names}


class LabelledFiles(LabelledText):
    """Files with a row a line: .jsonl (an object a line), or tables whose first line names the columns (tabs; quotes
    mean nothing).

    Args:
        train: the file to train on.
        val: for validation; test: for testing. None: none. A row without the label's field, or with null or an empty
            cell there, has no label.
        texts: fields of the texts, one or several, in the order in which the net reads them.
        label: field of the label.
        numbers: labels are numbers, not classes.
        classes: names of the classes by their numbers; None: the training labels, sorted.
        metrics: scores that judge, see evaluation/labels.py; None: accuracy, or spearman for numbers.
        options: `LabelledText`'s.

    Raises:
        UserError: in `setup`, missing or damaged files.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        texts: list[str] | None = None,
        label: str = "label",
        numbers: bool = False,
        classes: list[str] | None = None,
        metrics: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.files = {
            split: file for split, file in (("train", train), ("val", val), ("test", test)) if file is not None
        }
        self.texts, self.label, self.numbers = ["text"] if texts is None else texts, label, numbers
        if not self.texts:
            raise UserError("data.texts is empty: name the fields of the texts")
        self.class_names = [] if classes is None else [str(name) for name in classes]
        self.metrics = DEFAULT_METRICS[numbers] if metrics is None else metrics
        self.num_classes = 1 if numbers else len(self.class_names) or None

    def read(self) -> dict[str, list[Row]]:
        if not self.numbers and not self.class_names:
            records = read_records(Path(self.files["train"]).expanduser())
            values = [label_of(record, self.label) for record in records]
            self.class_names = sorted({class_name(value) for value in values if value is not None})
        if not self.numbers:
            self.num_classes = len(self.class_names)
            if self.num_classes < 2:
                raise UserError(
                    f"'{self.files['train']}' has {self.num_classes} classes in '{self.label}': give two or more"
                )
        return {split: self._rows(Path(file).expanduser()) for split, file in self.files.items()}

    def _rows(self, path: Path) -> list[Row]:
        rows = []
        for record in read_records(path):
            label = number_of(record, self.label) if self.numbers else class_of(record, self.label, self.class_names)
            rows.append(Row(tuple(text_of(record, field) for field in self.texts), label))
        return rows

    def describe_rows(self) -> dict[str, str | int]:
        names = {"class_names": ", ".join(self.class_names)} if self.class_names else {}
        return {"source": ", ".join(self.files.values()), **names}
