"""Multiple choice: records as the lm-evaluation-harness reads them, tokens, shares; malformed lines by name."""

import json
from pathlib import Path

import pytest
import torch

from data.tokenizer import JsonTokenizer, train_bpe
from moa_lightning.callbacks import MultipleChoice
from moa_lightning.errors import UserError
from moa_lightning.evaluation.multiple_choice import accuracies, as_batch, batches, continuations, read_questions

HELLASWAG = {
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he [x] [title] Starts",
    "endings": [" is using wrap.", "is ripping  [step] tiles off.", "é", "pulls [header] a cord [title] Now."],
    "label": "3",
}
ARC = {"question": "Which rises?", "choices": {"text": ["steam", "a → b"], "label": ["A", "B"]}, "answerKey": "B"}
PUBLISHED = {
    "id": "1",
    "question": {"stem": "Two?", "choices": [{"text": "1 + 1", "label": "1"}, {"text": "3", "label": "2"}]},
    "answerKey": "1",
}
OWN = {"ctx": "1 squared is", "endings": ["1", "22222222", "no number at all, é é é é é"], "label": 0}


def write(path: Path, *records: object) -> str:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records) + "\n\n")
    return str(path)


def test_records_become_text_as_the_harness_has_it(tmp_path: Path) -> None:
    found = read_questions(write(tmp_path / "a.jsonl", HELLASWAG, ARC, "", PUBLISHED, OWN))
    assert [(q.context, q.endings, q.answer) for q in found] == [
        (
            "Roof shingle removal: A man is sitting on a roof. He . starts",
            ("is using wrap.", "is ripping  tiles off.", "é", "pulls a cord. Now."),
            3,
        ),
        ("Question: Which rises?\nAnswer:", ("steam", "a → b"), 1),
        ("Question: Two?\nAnswer:", ("1 + 1", "3"), 0),
        ("1 squared is", tuple(OWN["endings"]), 0),
    ]
    assert found[2].place.endswith("a.jsonl', line 4")


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("{", "line 2 is no question"),
        ("[1]", "line 2 is no question"),
        ("\udcff", "line 2 is no question"),
        ({**HELLASWAG, "label": ""}, "line 2 is no question"),
        ({**HELLASWAG, "label": 4}, "line 2 has 4 endings and ending 4"),
        ({**HELLASWAG, "label": -1}, "line 2 has 4 endings and ending -1"),
        ({**OWN, "endings": "ab"}, "endings is no list"),
        ({**OWN, "endings": ["a", 3]}, "line 2 is no question"),
        ({**OWN, "endings": ["a", "[b]"]}, "not empty"),
        ({"endings": ["a", "b"], "label": 0}, "'ctx' is missing"),
        ({**ARC, "answerKey": "C"}, "line 2 is no question"),
        ({**ARC, "choices": {"text": ["a"], "label": ["B"]}}, "line 2 has 1 endings"),
    ],
)
def test_a_malformed_line_is_named(record: object, told: str, tmp_path: Path) -> None:
    line = record if isinstance(record, str) else json.dumps(record)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([json.dumps(OWN).encode(), line.encode(errors="surrogateescape")]))
    with pytest.raises(UserError, match=r"bad\.jsonl") as error:
        read_questions(str(path))
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_about_files_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, told in (("absent.jsonl", "cannot be read"), ("empty.jsonl", "holds no question")):
        with pytest.raises(UserError, match=told):
            read_questions(str(tmp_path / name))
    with pytest.raises(UserError, match="names in common"):
        MultipleChoice(["a/val.jsonl", "b/val.jsonl"])
    (question,) = read_questions(write(tmp_path / "a.jsonl", OWN))
    with pytest.raises(UserError, match=r"line 1 has an ending of 33 tokens, but the model reads 1 to 32"):
        continuations([question], lambda text: list(text.encode()), 32)


def test_an_ending_is_what_tokens_follow_those_of_the_context(tmp_path: Path) -> None:
    """Cut on the left where context and ending together are too long."""
    (tmp_path / "t.json").write_text(train_bpe(["the question and answer of steam rises"] * 9, 280).to_str())
    tokenizer = JsonTokenizer(str(tmp_path / "t.json"))

    def encode(text: str) -> list[int]:
        return tokenizer.encode([text.encode()])[0].tolist()

    (question,) = read_questions(write(tmp_path / "a.jsonl", ARC))
    first, _ = continuations([question], encode, 64)
    assert first.tokens == encode("Question: Which rises?\nAnswer: steam")
    assert first.tokens[-first.scored :] == encode(" steam")
    (short, _) = continuations([question], encode, 8)
    assert short.tokens == first.tokens[-9:]
    batch = as_batch([first, short])
    assert batch["tokens"][1, :8].tolist() == short.tokens[:-1]
    assert [row[row >= 0].tolist() for row in batch["targets"]] == [encode(" steam")] * 2


def test_batches_hold_every_ending_once_the_longest_first(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "a.jsonl", OWN, HELLASWAG, ARC))
    rows = continuations(questions, lambda text: list(text.encode()), 100)
    dealt = batches(rows, 4)
    assert [len(batch) for batch in dealt] == [4, 4, 1]
    assert sorted(number for batch in dealt for number in batch) == list(range(9))
    lengths = [len(rows[number].tokens) for batch in dealt for number in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_the_right_ending_has_the_largest_sum_or_the_largest_a_character_or_a_byte(tmp_path: Path) -> None:
    question = {"ctx": "a", "endings": ["éé", "abc", "éé"], "label": 0}
    questions = read_questions(write(tmp_path / "a.jsonl", question, question, question, {**question, "label": 1}))
    sums = [-6.0, -6.6, -6.0] * 2 + [-9.0, -1.0, -9.0] * 2  # in the first two: -3, -2.2 a character; -1.5, -2.2 a byte
    found = accuracies(questions, torch.tensor(sums, dtype=torch.float64))
    assert found == {"acc": 3 / 4, "acc_norm": 1 / 4, "acc_bytes": 3 / 4}
