"""Multiple choice at a validation, as a slow loop in float64 answers: one forward pass for each byte of each ending."""

from pathlib import Path

import pytest
import torch

from moa_lightning.callbacks import MultipleChoice
from moa_lightning.errors import UserError
from moa_lightning.evaluation.multiple_choice import read_questions
from moa_lightning.moe import MoEConfig
from tests.evaluation.test_multiple_choice import HELLASWAG, write
from tests.tasks.conftest import data_for, task, trainer


def slowly(net: torch.nn.Module, context: str, ending: str, limit: int) -> float:
    """Sum of log p over the bytes of " " + ending, one forward pass a byte, each with all that the model may see."""
    seen, total = list(context.encode()), 0.0
    whole = seen + list(f" {ending}".encode())
    cut = max(0, len(whole) - 1 - limit)  # what is cut off is cut off for all bytes of the ending
    for byte in whole[len(seen) :]:
        with torch.no_grad():
            log_p = net(torch.tensor([seen[cut:]])).double().log_softmax(-1)[0, -1]
        total, seen = total + float(log_p[byte]), [*seen, byte]
    return total


def test_a_validation_answers_as_a_slow_reference(text, tmp_path: Path) -> None:
    lines = [
        {"ctx": f"{n} squared", "endings": [f"is {n * n}", f"is {n}", "é" * (n % 3 + 1), "is a"], "label": n % 4}
        for n in range(12)
    ]
    files = [write(tmp_path / "own.jsonl", *lines), write(tmp_path / "hella.jsonl", HELLASWAG)]
    choices, model, module = MultipleChoice(files), task("language", "moa", loss_chunk=7), data_for("language", text)
    run = trainer(12, tmp_path, callbacks=[choices])
    run.fit(model, datamodule=module)
    run.validate(model, datamodule=module, verbose=False)
    net = model.net.double().eval()
    for name, path in zip(("own", "hella"), files, strict=True):
        questions = read_questions(path)
        expected = [[slowly(net, q.context, ending, 32) for ending in q.endings] for q in questions]
        right = {"acc": 0, "acc_norm": 0, "acc_bytes": 0}
        for question, sums in zip(questions, expected, strict=True):
            for kind, lengths in (
                ("acc", [1] * len(sums)),
                ("acc_norm", [len(ending) for ending in question.endings]),
                ("acc_bytes", [len(ending.encode()) for ending in question.endings]),
            ):
                worth = [value / length for value, length in zip(sums, lengths, strict=True)]
                right[kind] += worth.index(max(worth)) == question.answer
        for kind, count in right.items():
            assert float(run.callback_metrics[f"val/{name}_{kind}"]) == pytest.approx(count / len(questions))
        if name == "own":
            assert len(set(right.values())) > 1, right  # lengths decide some of them
        model.net.float()
        found = choices._log_likelihoods(choices.rows[name], run, model)
        model.net.double()
        flat = torch.tensor([value for sums in expected for value in sums], dtype=torch.float64)
        assert torch.allclose(found, flat, rtol=1e-5, atol=1e-4)


def test_experts_that_choose_tokens_answer_no_questions(text, tmp_path: Path) -> None:
    """What they make of an ending would depend on how far its row is filled up."""
    moe = MoEConfig(2, router="expert_choice", capacity_factor=1.0, see_later_tokens=True)
    choices = MultipleChoice(write(tmp_path / "own.jsonl", HELLASWAG))
    run = trainer(1, tmp_path, callbacks=[choices])
    with pytest.raises(UserError, match=r"--choices need .* experts that choose tokens"):
        run.validate(task("language", moe=moe), datamodule=data_for("language", text), verbose=False)
