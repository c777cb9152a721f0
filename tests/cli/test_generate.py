"""moa generate: the same text as without a cache, streamed and in batches; mistakes in one sentence."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data.tokenizer import open_tokenizer, train_bpe
from moa_lightning import generate
from moa_lightning.sampling import Sampling
from tests.cli.conftest import TEXT, Moa

MOE = "--model.moe.experts 4 --model.moe.balance bias -c configs/ffn/moa.yaml"
CHECKPOINT = "run/checkpoints/last.ckpt"


@pytest.fixture
def run(moa: Moa, words: None) -> None:
    """A run of two steps with experts and MoA in the folder run."""
    assert moa(f"{TEXT} {MOE} --trainer.max_steps 2 --run_dir run").code == 0


def greedy_without_cache(prompt: str, count: int) -> str:
    task, data = generate.load(CHECKPOINT, [])
    text = torch.tensor([data.encode(prompt)])
    with torch.no_grad():
        for _ in range(count):
            text = torch.cat([text, task.net.eval()(text)[:, -1:].argmax(-1)], dim=1)
    return data.decode(text[0].tolist())


class Uncached:
    """What a net without a cache has besides its answers."""

    context_length, weight = 64, torch.zeros(1)

    def parameters(self):
        return iter([self.weight])

    def new_cache(self) -> None:
        return None


def test_texts_are_those_of_the_net_and_the_seed(moa: Moa, run: None) -> None:
    command = f"generate --ckpt_path {CHECKPOINT} --max_new_tokens 8"
    cold = moa(f"{command} --prompt qui --temperature 0")
    assert (cold.code, cold.err) == (0, "")
    assert cold.out == greedy_without_cache("qui", 8) + "\n"
    for only_the_likeliest in ("--min_p 1", "--top_k 1", "--top_p 0.000001"):
        assert moa(f"{command} --prompt qui --temperature 3 {only_the_likeliest}").out == cold.out
    drawn = [moa(f"{command} --prompt qui --seed {seed} --top_k 50 --top_p 0.9 --min_p 0.01").out for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    Path("prompts.txt").write_text("the\nquick é\n")
    many = moa(f"{command} --prompt_file prompts.txt --num_samples 2 --temperature 0").out
    for number, prompt in enumerate(("the", "quick é"), start=1):
        for sample in (1, 2):
            assert f"--- prompt {number}, sample {sample}\n{greedy_without_cache(prompt, 8)}" in many


def test_mistakes_are_one_sentence(moa: Moa, run: None) -> None:
    ask = f"generate --ckpt_path {CHECKPOINT} --prompt a"
    Path("none.txt").touch()
    Path("gap.txt").write_text("a\n\nb\n")
    Path("elsewhere.ckpt").write_bytes(Path(CHECKPOINT).read_bytes())
    for line, named in (
        ("generate --prompt a", "--ckpt_path"),
        (f"generate --ckpt_path {CHECKPOINT}", "--prompt"),
        (f"{ask} --top_p 2", "top_p is 2.0"),
        (f"{ask} --temprature 1", "--temprature"),
        (f"{ask} --max_new_tokens 0", "--max_new_tokens"),
        (f"{ask} --max_new_tokens many", "'many'"),
        (f"{ask} --device moon", "--device 'moon'"),
        (f"generate --ckpt_path {CHECKPOINT} --prompt_file absent.txt", "'absent.txt'"),
        (f"generate --ckpt_path {CHECKPOINT} --prompt_file none.txt", "'none.txt' is empty"),
        (f"generate --ckpt_path {CHECKPOINT} --prompt_file gap.txt", "prompt 2 is empty"),
        ("generate --ckpt_path absent.ckpt --prompt a", "absent.ckpt"),
        ("generate --ckpt_path elsewhere.ckpt --prompt a", "config.yaml"),
    ):
        outcome = moa(line)
        assert outcome.code == 2, line
        assert outcome.out == ""
        assert outcome.err.count("\n") == 1
        assert named in outcome.err


def test_characters_of_several_bytes_are_not_torn(capsys: pytest.CaptureFixture[str]) -> None:
    class Spelling:
        context_length = 64

        def __init__(self, text: bytes) -> None:
            self.rest = list(text)
            self.weight = torch.zeros(1)

        def parameters(self):
            return iter([self.weight])

        def new_cache(self) -> "Spelling":
            self.length = 0
            return self

        def __call__(self, tokens: torch.Tensor, cache: "Spelling", *, last: int) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([[self.rest.pop(0)]]), 256).float()

    class Bytes:
        tokenizer, vocab_size = open_tokenizer("bytes"), 256

    for text in ("aé→𝄞b".encode(), b"\xff\xff\xe2\x80\x99", b"a\xe2\x80"):  # bad bytes; an end within a character
        count = ["--max_new_tokens", str(len(text))]
        options = generate._parser().parse_args(["--ckpt_path", "a", "--prompt", "x", *count])
        generate._write(Spelling(text), Bytes, "x", [1], 1, Sampling(0.0), options, alone=True)
        assert capsys.readouterr().out == f"x{text.decode(errors='replace')}\n"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_text_ends_at_the_token_between_documents(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = kind
    if kind == "bpe":
        name = str(tmp_path / "t.json")
        train_bpe(["ab cd ab cd"], 258).save(name)

    class Data:
        tokenizer = open_tokenizer(name)
        vocab_size = len(tokenizer.pieces)

    def ids(text: str) -> list[int]:
        return Data.tokenizer.encode([text.encode()])[0].tolist()

    end = Data.tokenizer.separator
    texts = [[*ids("xy"), end, *ids("dcx")], [*ids("zxyd"), end, *ids("c")]]

    class Reciting(Uncached):
        def __call__(self, tokens: torch.Tensor, cache: None, *, last: int) -> torch.Tensor:
            place = tokens.shape[1] - 1
            following = torch.tensor([[row[place]] for row in texts[: len(tokens)]])
            return torch.nn.functional.one_hot(following, Data.vocab_size).float()

    def written(*more: str, alone: bool) -> str:
        given = ["--ckpt_path", "a", "--prompt", "p", "--max_new_tokens", "6", *more]
        options = generate._parser().parse_args([*given, "--num_samples", "1" if alone else "2"])
        generate._write(Reciting(), Data, "p", [1], 1, Sampling(0.0), options, alone)
        return capsys.readouterr().out

    assert written(alone=True) == "pxy\n"
    assert written("--past_end", alone=True) == "pxy\n\ndcx\n"
    first, second = "--- prompt 1, sample 1\n", "--- prompt 1, sample 2\n"
    assert written(alone=False) == f"{first}pxy\n{second}pzxyd\n"
    assert written("--past_end", alone=False) == f"{first}pxy\n\ndcx\n{second}pzxyd\n\nc\n"


def test_a_text_is_written_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        shown = ""

        def flush(self) -> None:
            self.shown = self.getvalue()

    class Counting(Uncached):
        def __call__(self, tokens: torch.Tensor, cache: None, *, last: int) -> torch.Tensor:
            seen.append(screen.shown)
            return torch.nn.functional.one_hot(torch.tensor([[ord("a") + len(seen) - 1]]), 256).float()

    class Bytes:
        tokenizer, vocab_size = open_tokenizer("bytes"), 256

    screen, seen = Screen(), []
    monkeypatch.setattr(sys, "stdout", screen)
    options = generate._parser().parse_args(["--ckpt_path", "a", "--prompt", "x", "--max_new_tokens", "3"])
    generate._write(Counting(), Bytes, "x", [1], 1, Sampling(0.0), options, alone=True)
    assert seen[1:] == ["xa", "xab"]
    assert screen.shown == "xabc\n"


def test_budgets_branch_from_one_stable_run(moa: Moa, words: None) -> None:
    """A decay that starts from a checkpoint of a constant run ends as the run that was planned so from its start."""
    common = f"{TEXT} -c configs/ffn/la.yaml --model.optimizer.warmup_steps 2 --trainer.val_check_interval 100"
    wsd = "--model.optimizer.schedule wsd --model.optimizer.decay_fraction 0.5 --model.optimizer.decay_shape 1-sqrt"
    stable = "--model.optimizer.schedule constant --trainer.max_steps 20 --run_dir stable"
    kept = "--checkpoint.every_n_train_steps 2 --checkpoint.save_top_k -1"
    assert moa(f"{common} {stable} {kept}").code == 0
    late = moa(f"{common} {wsd} --trainer.max_steps 8 --ckpt_path stable/checkpoints/step0000006.ckpt --run_dir late")
    assert late.code == 2
    assert "step 6 has 1 of its peak rate, where this run (schedule wsd, 8 steps) has 0.293" in late.err
    for steps in (8, 12):
        start = f"stable/checkpoints/step{steps // 2:07d}.ckpt"
        outcome = moa(f"{common} {wsd} --trainer.max_steps {steps} --run_dir branch{steps} --ckpt_path {start}")
        assert outcome.code == 0, outcome.err
        assert moa(f"{common} {wsd} --trainer.max_steps {steps} --run_dir whole{steps}").code == 0
        branch, whole = (
            torch.load(f"{name}{steps}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for name in ("branch", "whole")
        )
        assert all(torch.equal(branch[name], whole[name]) for name in whole)


def test_a_mixture_of_token_files_trains_and_writes_its_own_tokens(moa: Moa, words: None) -> None:
    Path("more.jsonl").write_text('{"text": "some other words, on and on, to the end of the line"}\n' * 200)
    assert moa("data tokenizer --source words.txt more.jsonl --vocab_size 300 --out t.json").code == 0
    for source, out in (("words.txt", "a"), ("more.jsonl", "b")):
        assert moa(f"data tokens --source {source} --tokenizer t.json --out {out}").code == 0
    config = {
        "class_path": "data.Mixture",
        "init_args": {
            "sources": {name: {"class_path": "data.TokenFiles", "init_args": {"source": name}} for name in "ab"},
            "weights": {"a": 3.0, "b": 1.0},
        },
    }
    Path("mixture.yaml").write_text(yaml.safe_dump({"data": config}))
    sizes = "--data.context_length 16 --data.batch_size 4 --model.gpt.depth 1 --trainer.max_steps 2"
    fit = f"fit -c configs/language/gpt_tiny.yaml -c mixture.yaml --trainer.accelerator cpu {sizes} --run_dir run"
    outcome = moa(fit)
    assert outcome.code == 0, outcome.err
    assert "a (75.0%" in outcome.out
    assert "b (25.0%" in outcome.out
    assert "val/loss_a" in outcome.out
    assert "val/loss_b" in outcome.out
    task, data = generate.load(CHECKPOINT, [])
    assert task.net.embed.weight.shape[0] == data.vocab_size == 300
    ask = f"generate --ckpt_path {CHECKPOINT} --prompt qui --temperature 0 --max_new_tokens 8"
    told = moa(ask).out
    assert told == greedy_without_cache("qui", 8) + "\n"

    assert moa("data tokenizer --source words.txt more.jsonl --vocab_size 290 --out other.json").code == 0
    for source, out in (("words.txt", "a"), ("more.jsonl", "b")):
        shutil.rmtree(out)
        assert moa(f"data tokens --source {source} --tokenizer other.json --out {out}").code == 0
    changed = moa(fit.replace("max_steps 2", "max_steps 4") + " --ckpt_path last")
    assert changed.code == 2
    assert "the data's tokenizer" in changed.err
    for path in ("a", "b"):
        shutil.rmtree(path)
    Path("t.json").unlink()
    assert moa(ask).out == told  # the run's folder is enough
    Path("run/tokenizer.json").write_bytes(Path("other.json").read_bytes())
    swapped = moa(ask)
    assert swapped.code == 2
    assert "the run's tokenizer (run/tokenizer.json) is not the one" in swapped.err


def test_a_run_that_averages_its_weights_is_used_with_the_average(moa: Moa, words: None) -> None:
    line = f"{TEXT} -c configs/optimizer/ema.yaml --model.optimizer.average_decay 0.3 --trainer.max_steps 3"
    assert moa(f"{line} --run_dir run").code == 0
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    key = "blocks.0.mlp.down_proj.weight"
    expected = {"average": state[f"average.{key}"], "last": state[f"net.{key}"]}
    assert not torch.equal(*expected.values())
    for which, weight in expected.items():
        assert torch.equal(generate.load(CHECKPOINT, [], which)[0].net.state_dict()[key], weight)
        assert moa(f"export --ckpt_path {CHECKPOINT} --out {which}.safetensors --weights {which}").code == 0
        assert torch.equal(load_file(f"{which}.safetensors")[key], weight)
    assert torch.equal(generate.load(CHECKPOINT, [])[0].net.state_dict()[key], expected["average"])

    found = json.loads(Path("run/result.json").read_text())["metrics"]["val/loss"]
    validate = f"validate --ckpt_path {CHECKPOINT}"
    assert f"val/loss │ {found:.5g} " in re.sub(" +", " ", moa(validate).out)
    assert f"{found:.5g}" not in moa(f"{validate} --model.optimizer.evaluate last").out
