"""What the tests of text share: a text, JSON lines of it, token files, and what a mistake is told."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data import TokenFiles
from moa_lightning.errors import UserError

TEXT = "Ein Text über Äpfel: naïve café, 日本語 und 🙂.\n  def f(x):\n\treturn x ** 2\n"


def lines(folder: Path, count: int = 60, name: str = "a.jsonl") -> list[str]:
    texts = [f"{TEXT}number {n} " * (n % 7 + 1) for n in range(count)]
    (folder / name).write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return texts


def module_of(folder, **options) -> TokenFiles:
    module = TokenFiles(str(folder), context_length=16, batch_size=4, seed=0, **options)
    module.setup()
    return module


def stream(module: TokenFiles, split: str) -> np.ndarray:
    source = module.splits[split].source
    return source.read(0, len(source))


def message(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nanogpt_folder(folder: Path, text: str) -> dict[str, int]:
    """What nanoGPT's data/shakespeare_char/prepare.py writes: ids of the sorted characters as uint16, and its table."""
    folder.mkdir(exist_ok=True)
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    for split, part in (("train", text[: len(text) * 9 // 10]), ("val", text[len(text) * 9 // 10 :])):
        (folder / f"{split}.bin").write_bytes(np.array([ids[character] for character in part], "<u2").tobytes())
    table = {"vocab_size": len(ids), "itos": {number: text for text, number in ids.items()}, "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(table))
    return ids
