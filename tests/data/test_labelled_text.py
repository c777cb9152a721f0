"""Labelled text: the published layouts of GLUE and SuperGLUE, tasks of the standard library, own files, batches."""

import io
import itertools
import json
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import data
from data.benchmarks import BENCHMARKS, EXPERT_CHOICE
from data.documents import Document, split_documents, stdlib_documents
from data.labelled_text import Row, fitting
from data.stdlib_tasks import PIECE, STDLIB_TASKS, read_stdlib
from moa_lightning.errors import UserError

QUOTED = 'He said "no'  # one quote, which no reader may pair with a later one


def table(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(row.replace("|", "\t") for row in rows) + "\n").encode())


def write_glue(root: Path) -> None:
    """Two or three rows of every file, in the published columns."""
    table(root / "CoLA/train.tsv", f"gj04|1||{QUOTED}.", "gj04|0|*|The ran.")  # no header
    table(root / "CoLA/dev.tsv", "gj04|1||They left.")
    table(root / "CoLA/test.tsv", "index|sentence", "0|Bill.")  # but here
    table(root / "SST-2/train.tsv", "sentence|label", f"{QUOTED} |0", "fine\u2028 film |1")  # U+2028 ends no line
    table(root / "SST-2/dev.tsv", "sentence|label", "good |1")
    qqp = ["id|qid1|qid2|question1|question2|is_duplicate", f"1|1|2|{QUOTED}|b?|1", "2|3|4|a broken", "line?|c?|0"]
    table(root / "QQP/train.tsv", *qqp, "3|5|6|d?|e?|0")
    table(root / "QQP/dev.tsv", *qqp)
    table(root / "QQP/test.tsv", "id|question1|question2", "0|a?|b?")
    mrpc = "Quality|#1 ID|#2 ID|#1 String|#2 String"
    table(root / "MRPC/train.tsv", mrpc, f"1|1|2|{QUOTED}|b", "0|3|4|c|d")
    table(root / "MRPC/dev.tsv", mrpc, "0|5|6|e|f")
    sts = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2|score"
    table(root / "STS-B/train.tsv", sts, f"0|a|b|c|d|e|f|{QUOTED}|A plane.|5.000", "1|a|b|c|d|e|f|x|y|0.250")
    table(root / "STS-B/dev.tsv", sts, "0|a|b|c|d|e|f|x|y|2.500")
    mnli = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
    mnli += "|sentence1|sentence2|label1"
    row = "0|1|1c|government|( a )|( b )|(ROOT a)|(ROOT b)|a|b|neutral"
    table(root / "MNLI/train.tsv", f"{mnli}|gold_label", f"{row}|neutral", f"{row}|contradiction")
    more = "|label2|label3|label4|label5|gold_label"
    for kind, label in (("matched", "entailment"), ("mismatched", "contradiction")):
        table(root / f"MNLI/dev_{kind}.tsv", mnli + more, f"{row}|a|b|c|d|{label}")
        table(root / f"MNLI/test_{kind}.tsv", mnli.removesuffix("|label1"), row.removesuffix("|neutral"))
    table(root / "QNLI/train.tsv", "index|question|sentence|label", "0|who?|him.|entailment", "1|a|b|not_entailment")
    table(root / "QNLI/dev.tsv", "index|question|sentence|label", "0|q|s|not_entailment")
    for name, classes in (("RTE", ("entailment", "not_entailment")), ("WNLI", ("0", "1"))):
        rows = [f"{i}|a|b|{label}" for i, label in enumerate(classes)]
        table(root / name / "train.tsv", "index|sentence1|sentence2|label", *rows)
        table(root / name / "dev.tsv", "index|sentence1|sentence2|label", *rows)


def write_superglue(root: Path) -> None:
    span = {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 8}
    rows: dict[str, list[dict[str, Any]]] = {
        "BoolQ": [{"question": "is it", "passage": "It is.", "idx": 0, "label": True}],
        "CB": [{"premise": "p", "hypothesis": "h", "idx": 0, "label": "contradiction"}],
        "COPA": [{"premise": "p", "choice1": "a", "choice2": "b", "question": "cause", "idx": 0, "label": 1}],
        "WiC": [
            {"word": "bed", "sentence1": "s", "sentence2": "t", "idx": 0, "label": False}
            | {"start1": 0, "end1": 1, "start2": 0, "end2": 1, "version": 1.1}
        ],
        "WSC": [{"text": "Mark. He", "target": span, "idx": 0, "label": True}],
    }
    for name, part in rows.items():
        (root / name).mkdir(parents=True)
        for file in ("train", "val", "test"):
            given = part if file != "test" else [{k: v for k, v in row.items() if k != "label"} for row in part]
            (root / name / f"{file}.jsonl").write_text("\n".join(map(json.dumps, given)) + "\n")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    write_glue(root)
    write_superglue(root)
    return root


FIRST = {
    "cola": ((f"{QUOTED}.",), 1),
    "sst2": ((f"{QUOTED} ",), 0),
    "mrpc": ((QUOTED, "b"), 1),
    "stsb": ((QUOTED, "A plane."), 5.0),
    "qqp": ((QUOTED, "b?"), 1),
    "mnli": (("a", "b"), 1),
    "mnli_mm": (("a", "b"), 1),
    "qnli": (("who?", "him."), 0),
    "rte": (("a", "b"), 0),
    "wnli": (("a", "b"), 0),
    "boolq": (("is it", "It is."), 1),
    "cb": (("p", "h"), 1),
    "copa": (("cause", "p", "a", "b"), 1),
    "wic": (("bed", "s", "t"), 0),
    "wsc": (("Mark", "He", "Mark. He"), 1),
}
SCORES = {
    "cola": ["matthews"],
    "mrpc": ["accuracy", "f1"],
    "qqp": ["accuracy", "f1"],
    "stsb": ["pearson", "spearman"],
    "cb": ["accuracy", "macro_f1"],
}


def opened(published: Path, task: str, **options: Any) -> data.TextTask:
    module = data.TextTask(task, folder=str(published), batch_size=1, context_length=64, **options)
    module.setup()
    return module


@pytest.mark.parametrize("task", BENCHMARKS)
def test_published_files_are_read_as_they_are_meant(published: Path, task: str) -> None:
    module = opened(published, task)
    first = module.splits["train"].rows[0]
    assert (first.texts, first.label) == FIRST[task]
    assert module.metrics == SCORES.get(task, ["accuracy"])
    assert module.num_classes == {"stsb": 1, "mnli": 3, "mnli_mm": 3, "cb": 3}.get(task, 2)
    assert len(module.splits["train"]) == (1 if task in ("boolq", "cb", "copa", "wic", "wsc") else 2)
    if "test" in module.splits:
        labels = module.splits["test"].labels
        assert (labels == -1).all()


def test_the_quirks_of_the_files(published: Path, tmp_path: Path) -> None:
    assert len(opened(published, "qqp").splits["val"]) == 1  # the broken question is left out
    assert "fine\u2028 film " in opened(published, "sst2").splits["train"].rows[1].texts
    assert [opened(published, task).splits["val"].rows[0].label for task in ("mnli", "mnli_mm")] == [0, 2]
    scale = opened(published, "stsb")
    assert scale.target_scale == pytest.approx([2.625, 2.375])
    assert scale.splits["train"].labels.dtype == torch.float32
    assert set(EXPERT_CHOICE) < set(BENCHMARKS)
    assert len(EXPERT_CHOICE) == 11
    microsoft = tmp_path / "MRPC"
    header = "\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String"
    table(microsoft / "msr_paraphrase_train.txt", header, "1|10|11|a|b", "0|12|13|c|d", "1|14|15|e|f")
    table(microsoft / "msr_paraphrase_test.txt", header, "0|20|21|g|h")
    with pytest.raises(UserError, match=r"needs '.*dev_ids\.tsv'"):
        opened(tmp_path, "mrpc")
    table(microsoft / "dev_ids.tsv", "12|13")
    splits = opened(tmp_path, "mrpc").splits
    found = {split: [row.texts for row in part.rows] for split, part in splits.items()}
    assert found == {"train": [("a", "b"), ("e", "f")], "val": [("c", "d")], "test": [("g", "h")]}


MISTAKES = {
    "no folder": ({"task": "cola"}, r"name the folder that holds CoLA/train\.tsv in data\.folder"),
    "no file": ({"task": "boolq", "folder": "."}, r"data\.task boolq needs '.*BoolQ/train\.jsonl', which is not there"),
    "no task": ({"task": "colla"}, "did you mean cola"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_missing_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, words = MISTAKES[case]
    with pytest.raises(UserError, match=words):
        data.TextTask(**options).setup()


DAMAGES = {
    "mrpc, other names": (
        "mrpc",
        {
            "MRPC/msr_paraphrase_train.txt": "Quality|ID1|ID2|#1 String|#2 String\n1|10|11|a|b",
            "MRPC/dev_ids.tsv": "10|11",
        },
        r"msr_paraphrase_train\.txt line 2 has no text '#1 ID': it has Quality, ID1, ID2, #1 String, #2 String",
    ),
    "mrpc, other pairs": (
        "mrpc",
        {
            "MRPC/msr_paraphrase_train.txt": "Quality|#1 ID|#2 ID|#1 String|#2 String\n1|10|11|a|b",
            "MRPC/dev_ids.tsv": "11|10",
        },
        r"MRPC/dev_ids\.tsv' names no pair of msr_paraphrase_train\.txt to validate on",
    ),
    "no byte": (
        "boolq",
        {"BoolQ/train.jsonl": '{"question": "q", "passage": "p", "label": true}', "BoolQ/val.jsonl": ""},
        r"BoolQ/val\.jsonl' has no row",
    ),
    "broken lines only": (
        "qqp",
        {
            "QQP/train.tsv": "id|qid1|qid2|question1|question2|is_duplicate\n1|1|2|a|b|1",
            "QQP/dev.tsv": "id|qid1|qid2|question1|question2|is_duplicate\n1|1|2|a",
        },
        r"QQP/dev\.tsv' has no row",
    ),
    "no test row": (
        "rte",
        {
            "RTE/train.tsv": "index|sentence1|sentence2|label\n0|a|b|entailment",
            "RTE/dev.tsv": "index|sentence1|sentence2|label\n0|a|b|entailment",
            "RTE/test.tsv": "index|sentence1|sentence2",
        },
        r"RTE/test\.tsv' has no row",
    ),
    "a tab in a sentence": (
        "cola",
        {"CoLA/train.tsv": "gj04|1||They left.\ngj04|1||They|left."},
        r"CoLA/train\.tsv line 2 has 5 cells for 4 columns: repair it",
    ),
    "a tab in a question": (
        "qqp",
        {"QQP/train.tsv": "id|qid1|qid2|question1|question2|is_duplicate\n1|1|2|a|b|1|c"},
        r"QQP/train\.tsv line 2 has 7 cells for 6 columns: repair it",
    ),
    "a column twice": (
        "sst2",
        {"SST-2/train.tsv": "sentence|label|sentence\ngood|1|bad"},
        r"SST-2/train\.tsv line 1 names the column 'sentence' twice",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_named(case: str, tmp_path: Path) -> None:
    task, files, words = DAMAGES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content.replace("|", "\t"))
    with pytest.raises(UserError, match=words):
        opened(tmp_path, task)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize(("ending", "content"), [("jsonl", ""), ("tsv", "text\tlabel\n")])
def test_a_file_that_is_named_has_rows(split: str, ending: str, content: str, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.tsv") for name in ("train", "val", "test")}
    for file in files.values():
        table(Path(file), "text|label", "a|x", "b|y")
    files[split] = str(tmp_path / f"none.{ending}")
    Path(files[split]).write_text(content)
    with pytest.raises(UserError, match=rf"none\.{ending}' has no row: give one that has some"):
        data.LabelledFiles(**files, batch_size=1).setup()


def test_a_split_that_comes_out_empty_is_named() -> None:
    class Nothing(data.TextTask):
        def read(self) -> dict[str, list[Row]]:
            return {**super().read(), "val": []}

    with pytest.raises(UserError, match=r"stdlib_kind has no text in its val split: .* a larger val_fraction"):
        Nothing("stdlib_kind", context_length=128).setup()


def test_own_files_have_a_row_a_line(tmp_path: Path) -> None:
    rows = [{"a": "one", "b": "two", "kind": "x"}, {"a": "three", "b": "\ud800", "kind": "y"}]
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "train.jsonl").write_text(lines)
    table(tmp_path / "val.tsv", "kind|b|a", "y|four|five")
    files = {"train": str(tmp_path / "train.jsonl"), "val": str(tmp_path / "val.tsv")}
    module = data.LabelledFiles(**files, texts=["a", "b"], label="kind", batch_size=1)
    module.setup()
    assert (module.num_classes, module.class_names, module.metrics) == (2, ["x", "y"], ["accuracy"])
    assert module.splits["val"].rows == [(("five", "four"), 1)]
    module.splits["train"][0, 1]  # half a surrogate pair is no reason to stop
    for broken, words in (
        (lines + "\n{", "line 3 is not JSON"),
        (lines + '\n["a"]', "line 3 is not a JSON object"),
        (lines + '\n{"a": "x", "kind": "x"}', "line 3 has no text 'b'"),
    ):
        (tmp_path / "train.jsonl").write_text(broken)
        with pytest.raises(UserError, match=words):
            data.LabelledFiles(**files, texts=["a", "b"], label="kind").setup()
    table(tmp_path / "train.tsv", "text|score", "a|1.5", "b|nan")
    with pytest.raises(UserError, match="line 3 has the score 'nan', which is no finite number"):
        data.LabelledFiles(str(tmp_path / "train.tsv"), label="score", numbers=True).setup()
    for score in ("9" * 400, "1e39", "-1e39", "NaN"):  # no float64, no float32
        (tmp_path / "train.jsonl").write_text(f'{{"text": "a", "label": 3.4e38}}\n{{"text": "b", "label": {score}}}\n')
        with pytest.raises(UserError, match=r"train\.jsonl line 2 has the label .{3,43}, which is no finite number of"):
            data.LabelledFiles(str(tmp_path / "train.jsonl"), numbers=True).setup()
    table(tmp_path / "train.tsv", "text|score", "a")
    with pytest.raises(UserError, match="line 2 has 1 cells for 2 columns"):
        data.LabelledFiles(str(tmp_path / "train.tsv"), label="score").setup()


def test_null_and_empty_cells_are_no_label(tmp_path: Path) -> None:
    labels = ["x", None, "y", ""]
    rows = [{"text": "a", "label": label} for label in labels]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table(tmp_path / "a.tsv", "text|label", *(f"a|{label or ''}" for label in labels))
    table(tmp_path / "numbers.tsv", "text|label", "a|1.5", "a|", "a|0")
    for name in ("a.jsonl", "a.tsv"):
        module = data.LabelledFiles(str(tmp_path / name), val=str(tmp_path / name), batch_size=1)
        module.setup()
        assert (module.num_classes, module.class_names) == (2, ["x", "y"])
        assert [row.label for row in module.splits["val"].rows] == [0, None, 1, None]
    module = data.LabelledFiles(str(tmp_path / "numbers.tsv"), numbers=True, batch_size=1)
    module.setup()
    assert [row.label for row in module.splits["train"].rows] == [1.5, None, 0.0]


def test_the_next_text_needs_two_files_that_have_texts() -> None:
    """With one there is no other file to take a text from, and the search for it had no end."""
    long, short = Document("a", b"word " * 100, 0.1), Document("b", b"too short", 0.2)
    with pytest.raises(UserError, match="val split of stdlib_next has fewer than two files"):
        STDLIB_TASKS["stdlib_next"].rows({"val": [long, short]})


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [([3, 4], 9, [3, 4]), ([3, 40], 9, [3, 6]), ([40, 3], 9, [6, 3]), ([40, 40], 9, [4, 5]), ([9, 0, 9], 5, [2, 0, 3])],
)
def test_the_longest_texts_are_cut_first(lengths: list[int], room: int, kept: list[int]) -> None:
    assert fitting(lengths, room) == kept
    assert sum(kept) == min(room, sum(lengths))


def test_a_batch_is_padded_to_its_longest_and_every_text_has_its_end(published: Path) -> None:
    module = opened(published, "stsb")
    batch = module.splits["train"].batch([module.splits["train"][0, 0], module.splits["train"][0, 1]])
    first = f"{QUOTED}\0A plane.\0".encode()
    assert bytes(batch["tokens"][0].tolist()) == first
    assert bytes(batch["tokens"][1].tolist()) == b"x\0y\0" + bytes(len(first) - 4)
    assert batch["lengths"].tolist() == [len(first), 4]
    assert batch["label"].tolist() == [5.0, 0.25]
    assert module.splits["val"][0, ~0]["label"].isnan()  # padding of an uneven last batch
    short = data.TextTask("stsb", folder=str(published), context_length=8, batch_size=1)
    short.setup()
    assert bytes(short.splits["train"][0, 0]["tokens"].tolist()) == b"He \0A p\0"
    with pytest.raises(UserError, match="2 texts and their ends need 4"):
        data.TextTask("stsb", folder=str(published), context_length=3).setup()


@pytest.fixture(scope="module")
def library() -> dict[str, str]:
    """The text of every file of the standard library, by split and name."""
    parts = split_documents(stdlib_documents(), 0.15, 0.15)
    return {split: {d.name: d.content.decode("utf-8", "replace") for d in part} for split, part in parts.items()}


@cache
def other_than_code(text: str) -> list[tuple[int, int, int]]:
    """Begin and end of each comment (1) and string (2) of a source, by Python's own tokenizer, in characters."""
    lines = list(itertools.accumulate((len(line) + 1 for line in text.split("\n")), initial=0))
    found, opened = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        begin, end = (lines[row - 1] + column for row, column in (token.start, token.end))
        name = tokenize.tok_name[token.type]
        if name == "FSTRING_START":  # since 3.12 what stands in braces has tokens of its own
            opened.append(begin)
        elif name == "FSTRING_END":
            found.append((opened.pop(), end, 2))
        elif name in ("COMMENT", "STRING"):
            found.append((begin, end, 1 if name == "COMMENT" else 2))
    return found


def ending(text: str, piece: str) -> int:
    """What the last character of a piece of a source is a part of: 0 code, 1 a comment, 2 a string."""
    last = text.index(piece) + len(piece) - 1
    return max((kind for begin, end, kind in other_than_code(text) if begin <= last < end), default=0)


@pytest.mark.parametrize("task", ["stdlib_kind", "stdlib_next", "stdlib_indent"])
def test_tasks_of_the_standard_library_split_by_file_and_say_what_is_true(library: Any, task: str) -> None:
    rows = read_stdlib(task, 0.15, 0.15)
    assert rows == read_stdlib(task, 0.15, 0.15)
    assert rows.keys() == {"train", "val", "test"}
    for split, part in rows.items():
        assert len(part) > 500
        texts = library[split].values()
        if task != "stdlib_indent":
            labels = torch.tensor([row.label for row in part])
            assert torch.bincount(labels).unique().numel() == 1  # as many of each class
        for row in part[:: len(part) // 40]:
            if task == "stdlib_kind":
                assert row.label in [ending(text, row.texts[0]) for text in texts if row.texts[0] in text]
            elif task == "stdlib_next":
                first, second = row.texts
                assert len(first + second) == PIECE
                assert any(first in text for text in texts)
                assert any(second in text for text in texts)
                assert any(first + second in text for text in texts) or not row.label
            else:
                found = [text.split(row.texts[0], 1)[1] for text in texts if row.texts[0] in text]
                following = [rest.split("\n")[0].expandtabs() for rest in found]
                assert row.label in [min(40, len(line) - len(line.lstrip())) for line in following]


def test_a_shorter_validation_is_drawn_from_all_of_it(published: Path) -> None:
    module = data.TextTask("stdlib_next", context_length=128, max_val_samples=200)
    module.setup()
    labels = module.splits["val"].labels
    assert len(labels) == 200
    assert 70 < int(labels.sum()) < 130
    assert module.describe()["scores"] == "accuracy"
