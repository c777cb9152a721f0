"""What the tests of text share: a text, JSON lines of it, token files, and what a mistake is told."""

import json
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
