"""Judging texts by the command: from a language model's weights, resumed to the bit, judged and predicted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.conftest import TEXT, Moa

SMALL = "--model.gpt.depth 1 --model.gpt.dim 16 --model.gpt.num_heads 2 --trainer.log_every_n_steps 1"
JUDGE = (
    "fit -c configs/language/classify_tiny.yaml -c configs/ffn/moa.yaml --data LabelledFiles --data.train rows.jsonl "
    f"--data.val rows.jsonl --data.test rows.jsonl --data.batch_size 8 --trainer.accelerator cpu {SMALL} "
    "--trainer.val_check_interval 2"
)


@pytest.fixture
def rows() -> None:
    """rows.jsonl: forty words that hold an x or do not."""
    words = [f"{'x' if n % 2 else 'o'}{n * n}" for n in range(40)]
    text = "\n".join(json.dumps({"text": word, "label": "x" in word}) for word in words)
    Path("rows.jsonl").write_text(text)


def state(run: str) -> dict[str, torch.Tensor]:
    return torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]


@pytest.mark.usefixtures("words", "rows")
def test_a_language_model_is_fine_tuned_resumed_judged_and_asked(moa: Moa) -> None:
    assert moa(f"{TEXT} {SMALL} -c configs/ffn/gelu.yaml --trainer.max_steps 2 --run_dir language").code == 0
    judge = f"{JUDGE} --model.weights_from language --model.optimizer.schedule constant"
    whole = moa(f"{judge} --trainer.max_steps 4 --run_dir whole")
    assert whole.code == 0, whole.err
    assert "start   weights from language" in whole.out
    assert "val/score" in whole.out
    assert moa(f"{judge} --trainer.max_steps 2 --run_dir parts").code == 0
    Path("language").rename("elsewhere")
    assert moa("fit --run_dir parts --ckpt_path last --trainer.max_steps 4").code == 0
    expected, found = state("whole"), state("parts")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    for command in ("validate", "test"):
        outcome = moa(f"{command} --ckpt_path whole/checkpoints/last.ckpt --run_dir judged")
        assert outcome.code == 0, outcome.err
    assert moa("predict --ckpt_path whole/checkpoints/last.ckpt --out answers.npz").code == 0
    answers = np.load("answers.npz")
    right = 100 * (answers["prediction"] == answers["label"]).mean()
    metrics = json.loads(Path("judged/test.json").read_text())["metrics"]
    assert metrics["test/accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fit -c configs/language/gpt_tiny.yaml -c configs/data/stdlib_task.yaml", "does not train on TextTask"),
        ("fit -c configs/language/classify_tiny.yaml -c configs/data/stdlib.yaml", "needs --data TextTask"),
        (
            "fit -c configs/language/classify_tiny.yaml -c configs/data/stdlib_task.yaml --data.task qqp",
            "QQP/train.tsv",
        ),
        ("plan -c configs/language/classify_tiny.yaml --device h100 --data.task stdlib_foo", "did you mean stdlib_"),
    ],
)
def test_what_cannot_be_is_one_sentence(moa: Moa, line: str, words: str) -> None:
    outcome = moa(line)
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "'held_out.jsonl' has no row"),
        ('{"text": "ox"}\n' * 3, "none of the 3 validation texts has one"),
    ],
)
def test_a_fit_that_could_not_validate_leaves_nothing(moa: Moa, content: str, words: str) -> None:
    Path("held_out.jsonl").write_text(content)
    outcome = moa(f"{JUDGE} --data.val held_out.jsonl --trainer.max_steps 4 --run_dir run")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not Path("run").exists()


def test_a_fit_on_labels_is_planned(moa: Moa) -> None:
    outcome = moa("plan -c configs/language/classify_tiny.yaml -c configs/ffn/moa.yaml --device h100")
    assert outcome.code == 0, outcome.err
