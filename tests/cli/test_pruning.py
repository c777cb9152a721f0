"""Winning tickets by `moa fit`: a dense run, a round that is rewound, interrupted and exported, a random mask."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moa_lightning.checkpoints import RunCheckpointIO
from moa_lightning.pruning import density, sparsity_of, unpacked

from .conftest import MAE, Moa

LINE = f"{MAE} --model.backbone_args.embed_dim 32 --model.decoder_dim 16 --model.optimizer.warmup_steps 2"
DENSE = f"{LINE} --trainer.max_steps 5 --checkpoint.rewind_step 2 --run_dir dense"
ROUND = f"{LINE} --trainer.max_steps 5 --pruning.sparsity 0.5 --pruning.mask_from dense --pruning.rewind_to dense"


def checkpoint(run: str) -> dict:
    return RunCheckpointIO().load_checkpoint(Path(run, "checkpoints", "last.ckpt"))


def masks(run: str) -> dict[str, torch.Tensor]:
    return unpacked(checkpoint(run)["callbacks"]["Pruning"]["masks"])


def test_a_round_begins_at_the_early_step_with_the_mask_of_the_trained_weights(moa: Moa) -> None:
    assert moa(DENSE).code == 0
    trained = checkpoint("dense")["state_dict"]
    outcome = moa(f"{ROUND} --run_dir ticket")
    assert outcome.code == 0, outcome.err
    assert "going on after step 2" in outcome.out
    found = masks("ticket")
    sizes = np.concatenate([trained[name].abs().flatten().numpy() for name in found])
    kept = np.concatenate([mask.flatten().numpy() for mask in found.values()])
    assert kept.sum() == len(kept) - round(0.5 * len(kept))
    assert sizes[kept].min() >= sizes[~kept].max()
    assert json.loads(Path("ticket/pruning.json").read_text())["density"] == density(found)
    assert Path("ticket/pruning.png").read_bytes().startswith(b"\x89PNG")

    assert moa("export --ckpt_path ticket/checkpoints/last.ckpt --out ticket.safetensors").code == 0
    exported = load_file("ticket.safetensors")
    assert not [name for name in exported if name.endswith(("_orig", "_mask"))]
    assert exported.keys() == {name.removeprefix("net.") for name in trained if name.startswith("net.")}
    for name, mask in found.items():
        weight = exported[name.removeprefix("net.")]
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).float().mean() > 0.99

    random = f"{LINE} --trainer.max_steps 3 --pruning.sparsity 0.5 --pruning.mask_from ticket --pruning.shuffle true"
    assert moa(f"{random} --run_dir random").code == 0
    assert density(masks("random")) == density(found)
    assert any(not torch.equal(mask, found[name]) for name, mask in masks("random").items())
    refused = moa(f"{LINE} --run_dir x --trainer.max_steps 3 --pruning.sparsity 0.4 --pruning.mask_from ticket")
    assert (refused.code, "0.5 in all already" in refused.err) == (2, True)
    refused = moa(
        "fit --run_dir y --ckpt_path ticket/checkpoints/last.ckpt --trainer.max_steps 6 --pruning.sparsity 0 "
        "--pruning.mask_from null"
    )
    assert (refused.code, "the checkpoint's net is pruned" in refused.err) == (2, True)


def test_a_round_that_was_stopped_goes_on_with_its_mask(moa: Moa) -> None:
    line = f"{LINE} --model.optimizer.schedule constant --pruning.sparsity 0.7 --pruning.scope layer --run_dir"
    assert moa(f"{line} whole --trainer.max_steps 4").code == 0
    assert moa(f"{line} parts --trainer.max_steps 3").code == 0
    assert moa("fit --run_dir parts --ckpt_path last --trainer.max_steps 4").code == 0
    whole, parts = (checkpoint(run)["state_dict"] for run in ("whole", "parts"))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    assert all(abs(share - 0.3) < 0.01 for share in density(masks("parts")).values())


def test_masks_are_not_made_anew_from_weights_that_they_have_zeroed(moa: Moa) -> None:
    line = f"{LINE} --model.backbone_args.depth 2 --trainer.max_steps 3 --pruning.sparsity 0.5"
    assert moa(f"{line} --run_dir ticket").code == 0
    config = Path("ticket/config.yaml").read_text()
    for option, name in (("sparsity 0.3", "sparsity"), ("sparsity 0.8", "sparsity"), ("shuffle true", "shuffle")):
        refused = moa(f"fit --run_dir ticket --ckpt_path last --trainer.max_steps 4 --pruning.{option}")
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
        assert f"goes on with the masks that it has, and pruning.{name} would make others" in refused.err
    assert Path("ticket/config.yaml").read_text() == config
    begin = "fit --ckpt_path ticket/checkpoints/last.ckpt --trainer.max_steps 4 --run_dir"
    refused = moa(f"{begin} x --pruning.sparsity 0.3")
    assert (refused.code, "the masks to go on from have 0.5 in all already" in refused.err) == (2, True)
    refused = moa(f"{begin} y --pruning.sparsity 0.6 --pruning.dense_blocks 1")
    assert (refused.code, "give the same pruning.gates" in refused.err) == (2, True), refused.err
    assert moa(f"{begin} further --pruning.sparsity 0.6").code == 0
    before, after = masks("ticket"), masks("further")
    assert not any((after[name] & ~mask).any() for name, mask in before.items())
    assert moa("fit --run_dir ticket --ckpt_path last --trainer.max_steps 4").code == 0
    assert all(torch.equal(mask, before[name]) for name, mask in masks("ticket").items())
    moved = moa("fit --run_dir further --ckpt_path last --trainer.max_steps 5 --pruning.mask_from gone")
    assert moved.code == 0, moved.err  # the path that the masks came from is not needed again
    assert all(torch.equal(mask, after[name]) for name, mask in masks("further").items())

    assert moa(f"{LINE} --trainer.max_steps 3 --run_dir dense").code == 0
    assert moa("fit --run_dir dense --ckpt_path last --trainer.max_steps 4 --pruning.sparsity 0.5").code == 0
    assert sparsity_of(masks("dense")) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--pruning.sparsity 1", "pruning.sparsity is 1"),
        ("--pruning.shuffle true", "do nothing at sparsity 0"),
        ("--pruning.sparsity 0.5 --pruning.mask_from nowhere", "'nowhere' is no run with a checkpoint"),
        ("--pruning.sparsity 0.5 --pruning.rewind_to nowhere", "checkpoint 'nowhere' does not exist"),
        ("--pruning.sparsity 0.5 --pruning.dense_blocks 9", "lower pruning.dense_blocks"),
        ("--checkpoint.rewind_step 0", "checkpoint.rewind_step is 0"),
        ("--checkpoint.rewind_step 3", "checkpoint.rewind_step is 3 and the run has 2 steps"),
    ],
)
def test_mistakes_are_one_sentence(moa: Moa, options: str, sentence: str) -> None:
    outcome = moa(f"{LINE} --trainer.max_steps 2 --run_dir run {options}")
    assert (outcome.code, sentence in outcome.err, outcome.err.count("\n")) == (2, True, 1), outcome.err
    assert not Path("run").exists()
