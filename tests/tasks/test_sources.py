"""Bits per byte and the losses of a mixture's sources, recomputed from the text itself, with tokens of many bytes."""

import math

import numpy as np
import pytest
import torch

import data
from data.tokenizer import END_OF_TEXT, train_bpe
from tests.tasks.conftest import task, trainer


def test_sources_are_judged_by_their_own_text(tmp_path) -> None:
    texts = {
        "numbers": "".join(f"{n} squared is {n * n}, é\n" for n in range(400)),
        "words": "naïve café, 日本語 und 🙂, on and on, to the end of the line\n" * 40,
    }
    library = train_bpe(texts.values(), 330)
    (tmp_path / "t.json").write_text(library.to_str())
    end, held_out = library.token_to_id(END_OF_TEXT), {}
    for name, text in texts.items():
        held = text[: len(text) // 8]
        ids = {"train": library.encode(text).ids, "val": [*library.encode(held).ids, end, *library.encode(held).ids]}
        (tmp_path / name).mkdir()
        for split, tokens in ids.items():
            np.array(tokens, "<u2").tofile(tmp_path / name / f"{split}.bin")
        first = library.id_to_token(ids["val"][0])  # is not predicted; visible ASCII is spelled as itself
        held_out[name] = ids["val"], 2 * len(held.encode()) - len(first) + 1  # one for the token between both

    sources = {name: data.TokenFiles(str(tmp_path / name), str(tmp_path / "t.json")) for name in texts}
    module = data.Mixture(sources, context_length=32, batch_size=4, seed=0)
    model = task("language", "moa")
    run = trainer(2, tmp_path)
    run.fit(model, datamodule=module)
    run.validate(model, datamodule=module, verbose=False)
    model.eval()

    sums = {}
    for name, (ids, size) in held_out.items():
        total = 0.0
        for start in range(0, len(ids) - 1, 32):
            window = ids[start : start + 33]
            with torch.no_grad():
                log_p = model(torch.tensor([window[:-1]])).double().log_softmax(-1)[0]
            total -= sum(float(row[token]) for row, token in zip(log_p, window[1:], strict=True))
        sums[name] = total, len(ids) - 1, size
    total, tokens, size = (sum(part) for part in zip(*sums.values(), strict=True))
    expected = {
        "val/loss": total / tokens,
        "val/perplexity": math.exp(total / tokens),
        "val/bits_per_byte": total / math.log(2) / size,
        **{f"val/loss_{name}": own / count for name, (own, count, _) in sums.items()},
    }
    found = {name: float(value) for name, value in run.callback_metrics.items() if name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["val/loss_words"] != pytest.approx(expected["val/loss_numbers"], rel=1e-3)
