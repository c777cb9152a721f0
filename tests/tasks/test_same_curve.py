"""What saves memory or time leaves the loss curve alone: recomputation, accumulation, bfloat16 and compiled blocks."""

from typing import Any

import pytest

import data
import tasks.base
from moa_lightning.masking import IBOTConfig
from moa_lightning.parallel import transformer_blocks
from tests.tasks.conftest import data_for, task, trainer
from tests.tasks.recorder import Recorder

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "mae": {},
    # KoLeo looks for neighbours in a micro-batch, and what DINO chooses for five steps has the loss fall to where
    # bfloat16 is coarse
    "dino": {
        **{"center_momentum": 0.5, "ibot": IBOTConfig(), "koleo_weight": 0.0},
        **{"teacher_momentum": 0.996, "teacher_temperature": 0.07},
    },
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "recomputed": ({"activation_checkpointing": True}, {}, 1e-6),
    "selective": ({"activation_checkpointing": "selective"}, {}, 1e-6),
    "accumulated": ({}, {"accumulate_grad_batches": 2}, 1e-5),
    "bfloat16": ({}, {"precision": "bf16-mixed"}, 8e-3),
    "compiled": ({"compile": True}, {}, 1e-5),
}
"""options of the task, of the Trainer, largest relative difference of a step's loss"""


def curve(kind: str, text: Any, folder: Any, options: dict[str, Any], of_trainer: dict[str, Any]) -> list[float]:
    """The loss of each step."""
    recorder, parts = Recorder(), of_trainer.get("accumulate_grad_batches", 1)
    module: data.Images = data_for(kind, text)
    module.batch_size //= parts
    run = trainer(STEPS, folder, callbacks=[recorder], limit_val_batches=0, **of_trainer)
    run.fit(task(kind, "moa", seed=0, **OPTIONS[kind], **options), datamodule=module)
    return [sum(recorder.losses[n : n + parts]) for n in range(0, len(recorder.losses), parts)]


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_loss_curve_is_the_same(kind: str, text, tmp_path, monkeypatch) -> None:
    """DINO's blocks have many shapes: of the compiler only the graphs that it takes, no kernels of them."""
    compiled = []

    def compile_blocks(net: Any) -> None:
        for block in transformer_blocks(net):
            block.compile(backend="inductor" if kind == "mae" else "eager")
            compiled.append(block)

    monkeypatch.setattr(tasks.base, "compile_blocks", compile_blocks)
    expected = curve(kind, text, tmp_path, {}, {})
    assert len(expected) == STEPS
    assert abs(expected[-1] / expected[0] - 1) > 0.03, "it trains"
    for name, (options, of_trainer, tolerance) in VARIANTS.items():
        found = curve(kind, text, tmp_path, options, of_trainer)
        if (kind, name) == ("mae", "bfloat16"):
            tolerance = 2e-3
        assert found == pytest.approx(expected, rel=tolerance), name
        if name == "bfloat16":
            assert found != pytest.approx(expected, rel=1e-6), "it is in bfloat16"
    assert compiled
