"""liger_kernel's fused output matrix and loss, in Triton's interpreter, against the chunks: values and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moa_lightning import FFNConfig, UserError
from moa_lightning.models import GPTConfig
from tasks import LanguageModeling

ROOT = Path(__file__).parents[2]
VOCAB, SHAPE = 301, (3, 40)  # no powers of two, several chunks


def compare(z_loss_weight: float, tied: bool) -> None:
    """Fails where a training step or an evaluation differs between the two."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, VOCAB, SHAPE, generator=generator) for _ in range(2))
    targets[0, :7] = targets[2, 5] = -100
    found = []
    for fused in (False, True):
        config = GPTConfig(1, 16, 2, tie_embeddings=tied)
        sizes = {"vocab_size": VOCAB, "context_length": SHAPE[1], "seed": 0}
        task = LanguageModeling(
            config, FFNConfig(), loss_chunk=50, z_loss_weight=z_loss_weight, fused_loss=fused, **sizes
        )
        task.configure_model()
        logged = {}
        task.log = lambda name, value, logged=logged, **kwargs: logged.update({name: value})
        batch = {"tokens": tokens, "targets": targets}
        task.training_step(batch, 0).backward()
        with torch.no_grad():
            nll = task.nll(batch)
        found.append({**logged, "nll": nll, **{name: p.grad for name, p in task.net.named_parameters()}})
    assert (found[0]["nll"][targets == -100] == 0).all()
    assert ("train/z_loss" in found[0]) == (z_loss_weight > 0)
    assert not torch.equal(found[0]["nll"], found[1]["nll"])  # two ways, not one taken twice
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("settings", ["0.0, False", "0.01, True"])
def test_fused_kernels_agree_with_chunks(settings: str) -> None:
    pytest.importorskip("triton")
    outcome = subprocess.run(
        [sys.executable, "-c", f"from tests.losses.test_fused import compare; compare({settings})"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr


def test_without_a_gpu_the_chunks_are_taken() -> None:
    task = LanguageModeling(GPTConfig(1, 16, 2), FFNConfig(), vocab_size=11, context_length=8, seed=0, fused_loss=True)
    task.configure_model()
    batch = {"tokens": torch.randint(0, 11, (3, 8)), "targets": torch.randint(0, 11, (3, 8))}
    logits = task.net(batch["tokens"])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="none")
    torch.testing.assert_close(task.nll(batch).flatten(), expected)


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.language_modeling.find_spec", lambda name: None)
    with pytest.raises(UserError, match="liger_kernel"):
        LanguageModeling(GPTConfig(1, 16, 2), FFNConfig(), fused_loss=True)
