"""moa export --to hf: what transformers writes then is what moa generate says; mistakes in one sentence."""

from pathlib import Path

import pytest

from tests.cli.conftest import TEXT, Moa

transformers = pytest.importorskip("transformers")


def test_the_command_writes_what_moa_generate_says(moa: Moa, words: None) -> None:
    steps = "--trainer.max_steps 20 --model.optimizer.lr 0.01"
    assert moa(f"{TEXT} -c configs/ffn/swiglu.yaml {steps} --run_dir run").code == 0
    export = "export --to hf --ckpt_path run/checkpoints/last.ckpt --out new/hub"
    told = moa(export)
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith("new/hub: Qwen3ForCausalLM, ")
    assert told.out.count("\n") == 1
    assert [path.name for path in Path("new").iterdir()] == ["hub"]
    tokenizer = transformers.AutoTokenizer.from_pretrained("new/hub")
    model = transformers.AutoModelForCausalLM.from_pretrained("new/hub")
    new = model.generate(**tokenizer("qui", return_tensors="pt"), max_new_tokens=12, do_sample=False)
    said = moa("generate --ckpt_path run/checkpoints/last.ckpt --prompt qui --temperature 0 --max_new_tokens 12").out
    assert tokenizer.decode(new[0]) + "\n" == said

    for line, named in (
        (export, "exists already"),
        (export.replace("new/hub", "/proc/hub"), "cannot be written"),
        (f"{export}2".replace("run/checkpoints/last.ckpt", "absent.ckpt"), "absent.ckpt"),
    ):
        outcome = moa(line)
        assert outcome.code == 2, line
        assert outcome.err.count("\n") == 1
        assert named in outcome.err
