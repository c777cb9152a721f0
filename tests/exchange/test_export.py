"""moa export: the weights of a file and of shards as one safetensors file, from which the net can be built again."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file

from moa_lightning.checkpoint_reading import split_tensors
from moa_lightning.cli import main
from moa_lightning.feedforward import FFNConfig
from moa_lightning.models import GPTConfig
from tasks import LanguageModeling


@pytest.fixture
def task() -> LanguageModeling:
    size = GPTConfig(depth=1, dim=16, num_heads=2, tie_embeddings=True)
    task = LanguageModeling(size, FFNConfig("moa"), vocab_size=11, context_length=8, seed=0)
    task.configure_model()
    return task


def checkpoint(task: LanguageModeling) -> dict[str, object]:
    content = {"state_dict": task.state_dict(), "global_step": 7, "hyper_parameters": dict(task.hparams)}
    return {**content, "optimizer_states": []}


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_the_exported_weights_build_the_same_net(task, tmp_path, capsys, kind):
    path = tmp_path / "a.ckpt"
    if kind == "file":
        torch.save(checkpoint(task), path)
    else:
        tensors, rest = split_tensors(checkpoint(task))
        dcp.save(tensors, checkpoint_id=path, no_dist=True)
        torch.save(rest, path / "meta.pt")
    out = tmp_path / "new" / "gpt.safetensors"
    assert main(["export", "--ckpt_path", str(path), "--out", str(out)]) == 0
    assert f"{out}: {len(task.net.state_dict())} tensors" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["step"] == "7"
    again = LanguageModeling(**json.loads(metadata["hyper_parameters"]))
    again.configure_model()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.fill_(torch.nan)
    again.net.load_state_dict(load_file(out))
    tokens = torch.arange(8)[None]
    assert torch.equal(again(tokens), task(tokens))


def test_mistakes_are_one_sentence(task, tmp_path, capsys):
    path, out = tmp_path / "a.ckpt", tmp_path / "a.safetensors"
    torch.save({"global_step": 1, "state_dict": {"x": torch.zeros(1)}}, path)
    assert main(["export", "--ckpt_path", str(path), "--out", str(out)]) == 2
    assert "holds no net" in capsys.readouterr().err
    assert main(["export", "--ckpt_path", str(tmp_path / "none.ckpt"), "--out", str(out)]) == 2
    assert "does not exist" in capsys.readouterr().err
    torch.save(checkpoint(task), path)
    out.write_text("mine")
    assert main(["export", "--ckpt_path", str(path), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", "--ckpt_path", str(path), "--out", "/proc/a.safetensors"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert Path(out).read_text() == "mine"
