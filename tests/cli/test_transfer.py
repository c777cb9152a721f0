"""From the command line: a finished fixed net goes on as MoA, and what is not there is one sentence."""

import csv
import json
from pathlib import Path

import pytest
import torch

from moa_lightning.checkpoints import RunCheckpointIO
from moa_lightning.pruning import sparsity_of, unpacked
from tests.cli.conftest import TEXT, Moa

RUN = " --model.gpt.dim 16 --model.gpt.num_heads 2 --trainer.val_check_interval 3 --trainer.log_every_n_steps 1"


def losses(run: str, name: str = "train/loss") -> dict[int, float]:
    """By step."""
    with Path(run, "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


@pytest.mark.usefixtures("words")
def test_a_finished_net_goes_on_as_moa_from_its_loss(moa: Moa) -> None:
    base = moa(f"{TEXT} {RUN} -c configs/ffn/gelu.yaml --model.optimizer.lr 0.02 --trainer.max_steps 6 --run_dir base")
    assert base.code == 0, base.err
    fits = {
        ffn: f"{TEXT} {RUN} -c configs/ffn/{ffn}.yaml --trainer.max_steps 3 --run_dir {ffn}" for ffn in ("gelu", "moa")
    }
    for ffn, fit in fits.items():
        outcome = moa(f"{fit} --model.weights_from base --trainer.num_sanity_val_steps -1")
        assert outcome.code == 0, outcome.err
        assert "start   weights from base" in outcome.out
        assert losses(ffn, "val/loss")[0] == pytest.approx(losses("base", "val/loss")[6], rel=1e-6)  # from one point
    assert losses("moa")[1] == pytest.approx(losses("gelu")[1], rel=1e-6)
    assert losses("moa")[1] < losses("base")[1] - 0.1
    assert json.loads(Path("moa/result.json").read_text())["steps"] == 3
    missing = moa(f"{TEXT} {RUN} --trainer.max_steps 3 --model.weights_from nowhere --run_dir c")
    assert missing.code == 2
    assert "model.weights_from: there is no nowhere" in missing.err
    Path("base").rename("elsewhere")
    resumed = moa("fit --run_dir moa --ckpt_path last --trainer.max_steps 4")
    assert (resumed.code, "weights from" in resumed.out) == (0, False)  # the checkpoint has it all


JOINT = "fit -c configs/joint/mae_gpt_tiny.yaml -c configs/trainer/cpu.yaml"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{JOINT} --data Images", "Joint does not train on Images"),
        (f"{JOINT} --model LanguageModeling", "LanguageModeling does not train on Joint"),
        (f"{JOINT} --model.tie [beta]", "beta"),
        (f"{JOINT} --data.vision_ratio 0 --data.language_ratio 0", "give whole numbers"),
        (f"{JOINT} --model.vision.gpt.dim 3", "model.vision.gpt.dim is not an option of MAE"),
        (f"plan{JOINT.removeprefix('fit')} --device h100", "moa plan knows fits of one task"),
    ],
)
def test_a_joint_fit_that_cannot_be_is_one_sentence(moa: Moa, line: str, words: str) -> None:
    outcome = moa(line)
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def check_parts(moa: Moa) -> None:
    """Each task of the joint run `both` as a run of its own: the same metrics, and all commands take it."""
    assert moa("test --ckpt_path both/checkpoints/last.ckpt").code == 0
    together = json.loads(Path("both/test.json").read_text())["metrics"]
    for part in ("vision", "language"):
        outcome = moa(f"export --to run --part {part} --ckpt_path both/checkpoints/last.ckpt --out {part}")
        assert outcome.code == 0, outcome.err
        assert moa(f"test --ckpt_path {part}/checkpoints/last.ckpt").code == 0
        alone = json.loads(Path(f"{part}/test.json").read_text())["metrics"]
        assert {f"{name}_{part}" for name in alone} == {name for name in together if name.endswith(part)}
        for name, value in alone.items():
            assert value == pytest.approx(together[f"{name}_{part}"], rel=1e-5), name
    assert moa("generate --prompt def --ckpt_path language/checkpoints/last.ckpt --max_new_tokens 4").code == 0
    assert moa("export --to hf --ckpt_path language/checkpoints/last.ckpt --out hub").code == 0
    assert moa("export --to timm --ckpt_path vision/checkpoints/last.ckpt --out encoder.safetensors").code == 0
    assert moa("predict --ckpt_path vision/checkpoints/last.ckpt").code == 0
    for command, sentence in {
        "generate --prompt def --ckpt_path both/checkpoints/last.ckpt": "make its task a run of its own",
        "export --to timm --ckpt_path both/checkpoints/last.ckpt --out x": "is of a joint run",
        "export --to run --ckpt_path both/checkpoints/last.ckpt --out x": "say which, --part vision or",
        "export --to run --part vision --ckpt_path both/checkpoints/last.ckpt --out vision": "exists already",
        "export --to run --part vision --ckpt_path vision/checkpoints/last.ckpt --out x": "is of one task",
        "fit --run_dir vision --ckpt_path last --trainer.max_steps 6": "no state of training to go on from",
        f"{TEXT} --model.weights_from both --run_dir x": "is of a joint run",
    }.items():
        outcome = moa(command)
        assert (outcome.code, outcome.err.count("\n"), sentence in outcome.err) == (2, 1, True), outcome.err
        assert not Path("x").exists()


def test_a_joint_run_is_resumed_judged_and_exported(moa: Moa, words: None) -> None:
    small = (
        "-c configs/ffn/moa.yaml --model.vision.backbone_args.embed_dim 32 --model.vision.backbone_args.depth 1 "
        "--model.vision.decoder_dim 16 --model.language.gpt.dim 32 --model.language.gpt.depth 1 "
        "--model.tie [alpha,gates] "
        "--data.vision.batch_size 8 --data.vision.bank_size 16 --data.vision.max_val_samples 8 "
        "--data.language.batch_size 2 --data.language.context_length 32 --data.language.max_val_samples 4 "
        "--trainer.val_check_interval 2 --trainer.log_every_n_steps 1"
    )
    outcome = moa(f"{JOINT} {small} --trainer.max_steps 2 --run_dir both")
    assert outcome.code == 0, outcome.err
    outcome = moa("fit --run_dir both --ckpt_path last --trainer.max_steps 4 --model.tie []")
    assert (outcome.code, "model.tie, optimizer" in outcome.err) == (2, True), outcome.err
    outcome = moa("fit --run_dir both --ckpt_path last --trainer.max_steps 4")
    assert outcome.code == 0, outcome.err
    result = json.loads(Path("both/result.json").read_text())
    assert (result["steps"], result["samples"], result["tokens"]) == (4, 40, 256)
    names = {"val/loss_vision", "val/knn_top1_vision", "val/linear_top1_vision"}
    names |= {"val/loss_language", "val/bits_per_byte_language"}
    assert names <= result["metrics"].keys()
    mixes = {layer["module"] for layer in json.loads(Path("both/mixing.json").read_text())["layers"].values()}
    assert mixes >= {"vision.encoder.blocks.0.mlp.up_mix", "language.blocks.0.mlp.up_mix"}
    written = {path.name for path in Path("both").rglob("*")}
    assert {"reconstruction-step000004.png", "mixing-patches-step000004.png", "sample-step000004.txt"} <= written
    assert moa("validate --ckpt_path both/checkpoints/last.ckpt").code == 0
    assert moa("export --ckpt_path both/checkpoints/last.ckpt --out both.safetensors").code == 0
    assert moa("report both").code == 0
    check_parts(moa)
    outcome = moa("predict --ckpt_path both/checkpoints/last.ckpt")
    assert (outcome.code, "takes the samples of one task" in outcome.err) == (2, True)
    outcome = moa("validate --ckpt_path both/checkpoints/last.ckpt --freeze_gates 2")
    assert (outcome.code, "tied ones cannot have" in outcome.err, "val/loss" in outcome.out) == (2, True, False)
    outcome = moa("validate --ckpt_path both/checkpoints/last.ckpt --freeze_gates 2 --model.tie []")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize("tie", ["[]", "[ffn]", "[gates]"])
def test_a_part_of_a_pruned_joint_run_keeps_its_masks_and_mixes(moa: Moa, tie: str) -> None:
    gpt = "gpt.dim 32 --model.gpt.num_heads 2 --model.gpt.depth 2 --data.context_length 32 --model.ffn.bias true"
    small = (
        "-c configs/ffn/moa.yaml --model.ffn.bias true --model.vision.backbone_args.embed_dim 32 "
        "--model.vision.backbone_args.depth 2 --model.vision.decoder_dim 16 --model.language.gpt.dim 32 "
        "--model.language.gpt.num_heads 2 --model.language.gpt.depth 2 --data.vision.batch_size 8 "
        "--data.vision.bank_size 16 --data.vision.max_val_samples 8 --data.language.batch_size 2 "
        "--data.language.context_length 32 --data.language.max_val_samples 4 --trainer.val_check_interval 2"
    )
    gates = f"--pruning.gates {'true' if tie == '[gates]' else 'false'}"
    fit = f"{JOINT} {small} --trainer.max_steps 2 --model.tie {tie} --pruning.sparsity 0.5 {gates} --run_dir both"
    outcome = moa(fit)
    assert outcome.code == 0, outcome.err
    whole = RunCheckpointIO().load_checkpoint(Path("both/checkpoints/last.ckpt"))
    state, held = whole["state_dict"], unpacked(whole["callbacks"]["Pruning"]["masks"])
    assert all(torch.equal(state[name] == 0, ~mask) for name, mask in held.items())
    assert sparsity_of(held) == pytest.approx(0.5, abs=1e-5)  # each weight counted once
    assert len(held) == {"[]": 20, "[ffn]": 16, "[gates]": 23}[tie]

    own_gates = {"vision": 3, "language": 2} if tie == "[gates]" else {"vision": 0, "language": 0}
    for part, layers in ("vision", 12), ("language", 8):
        outcome = moa(f"export --to run --part {part} --ckpt_path both/checkpoints/last.ckpt --out {part}")
        assert outcome.code == 0, outcome.err
        own = RunCheckpointIO().load_checkpoint(Path(part, "checkpoints/last.ckpt"))
        masks = unpacked(own["callbacks"]["Pruning"]["masks"])
        assert len(masks) == layers + own_gates[part]
        assert all(torch.equal(own["state_dict"][name] == 0, ~mask) for name, mask in masks.items())
        share = json.loads(Path(part, "pruning.json").read_text())["sparsity"]
        assert share == pytest.approx(sparsity_of(masks), abs=1e-9)
        if (part, tie) != ("language", "[ffn]"):
            mixes = json.loads(Path(part, "mixing.json").read_text())["layers"].values()
            bases = {f"net.{mix['module']}.base" for mix in mixes}
            assert bases == {name for name in own["state_dict"] if name.endswith("mix.base")}

    line = f"fit -c configs/language/gpt_tiny.yaml -c configs/data/stdlib.yaml --model.{gpt} --trainer.max_steps 2"
    ticket = f"--model.weights_from language --pruning.mask_from language {gates} --pruning.sparsity"
    outcome = moa(f"{line} -c configs/ffn/moa.yaml {ticket} {share} --run_dir ticket")
    assert outcome.code == 0, outcome.err
    content = RunCheckpointIO().load_checkpoint(Path("ticket/checkpoints/last.ckpt"))
    taken = unpacked(content["callbacks"]["Pruning"]["masks"])
    assert all(torch.equal(taken[name], mask) for name, mask in masks.items())
    refused = moa(f"{line} -c configs/ffn/moa.yaml {ticket} 0.1 --run_dir x")
    assert (refused.code, "in all already; give at least that" in refused.err) == (2, True), refused.err

    outcome = moa(f"{line} -c configs/ffn/la.yaml --model.ffn.start_from language --run_dir la")
    assert outcome.code == (2 if tie == "[ffn]" else 0), outcome.err
    if tie == "[]":
        refused = moa(f"{line} -c configs/ffn/la.yaml --model.ffn.start_from both --run_dir x")
        assert (refused.code, "is of a joint run; make its task a run" in refused.err) == (2, True), refused.err
