"""`moa plan` on the command line: without data, without devices, with one sentence for a mistake."""

import json
import re
from pathlib import Path

import pytest

from moa_lightning.help import PLAN
from moa_lightning.planning.command import _own_options
from moa_lightning.planning.devices import DEVICES
from tests.cli.conftest import Moa, _alone, moa  # noqa: F401 - fixtures

TEXT = "plan -c configs/language/gpt_tiny.yaml -c configs/ffn/moa.yaml --device h100"
DIGITS = "-c configs/data/mnist5k.yaml --device h100"


def test_a_plan_is_a_table_and_a_sentence(moa: Moa) -> None:  # noqa: F811
    outcome = moa(f"{TEXT} --devices 2 --price 3 --trainer.precision auto")
    assert (outcome.code, outcome.err) == (0, "")
    for part in ("bf16-mixed", "1,500 steps of 16 samples", "3,072,000 tokens", "DDP buckets", "all-reduce sends"):
        assert part in outcome.out
    assert re.search(r"cost\s+│\s+0.0", outcome.out)
    assert re.fullmatch(r"It fits: one step needs .* MB of the 80 GB of each of 2 h100\.", outcome.out.splitlines()[-1])
    assert "cost" not in moa(f"{TEXT} --devices 2").out
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("line", ["mae_tiny.yaml -c configs/ffn/moa_gated_both.yaml", "dino_tiny.yaml"])
def test_pictures_are_planned_without_pictures(moa: Moa, line: str) -> None:  # noqa: F811
    outcome = moa(f"plan -c configs/vision/{line} {DIGITS} -c configs/trainer/fsdp.yaml --devices 4 --json")
    plan = json.loads(outcome.out)
    assert (plan["strategy"], plan["tokens"], plan["plans"][0]["fits"]) == ("fsdp2", None, True)
    assert plan["samples"] == plan["steps"] * plan["plans"][0]["batch_size"]
    assert plan["plans"][0]["memory"]["peak"] > plan["plans"][0]["memory"]["activations"]


@pytest.mark.parametrize("source", ["image_folder.yaml", "image_shards.yaml"])
def test_data_that_are_nowhere_are_not_missed(moa: Moa, source: str) -> None:  # noqa: F811
    line = f"plan -c configs/vision/mae_tiny.yaml -c configs/data/{source} --device h100 --devices 2 --json"
    small = json.loads(moa(f"{line} --data.image_size 32 --data.channels 1").out)
    assert small["parameters"]["trained"] < json.loads(moa(line).out)["parameters"]["trained"]


def test_the_vocabulary_is_an_option(moa: Moa) -> None:  # noqa: F811
    bytes_, words = (
        json.loads(moa(f"{TEXT} --devices 1 --json {option}").out)["parameters"]
        for option in ("", "--model.vocab_size 1256")
    )
    assert words["embeddings"] - bytes_["embeddings"] == 1000 * 128
    assert words["trained"] - bytes_["trained"] == 2 * 1000 * 128


def test_the_smallest_number_is_marked(moa: Moa) -> None:  # noqa: F811
    small = f"{TEXT} --data.batch_size 8"
    peak = json.loads(moa(f"{small} --devices 4 --json").out)["plans"][0]["memory"]["peak"]
    outcome = moa(f"{small} --memory {1.01 * peak / 1e9}")
    assert re.search(r"devices +┃ +1 ┃ +2 ┃ +4 \* ┃ +8 ┃", outcome.out)
    assert re.search(r"fits +│ +in 1/\d │ +in 1/\d │ +yes │ +yes │", outcome.out)
    answer = outcome.out.splitlines()[-1]
    assert re.match(r"4 h100 are needed for the run as configured, or 1 with --data.batch_size \d", answer)


MISTAKES = {
    "no device": ("plan -c configs/language/gpt_tiny.yaml", ["--device", "h100"]),
    "unknown device": (f"{TEXT[:-4]}v100", ["'v100' is unknown", "--memory"]),
    "count": (f"{TEXT} --devices 0", ["--devices", "'0' is not above 0"]),
    "number": (f"{TEXT} --price cheap", ["--price", "number"]),
    "share": (f"{TEXT} --mfu 40", ["--mfu is 40"]),
    "batch": (f"{TEXT} --devices 3", ["batch_size is 16", "3 devices"]),
    "option": (f"{TEXT} --devicess 8", ["--devicess is not an option"]),
    "option of fit": (f"{TEXT} --model.gpt.dept 8", ["did you mean --model.gpt.depth?"]),
    "file": (f"{TEXT} -c nope.yaml", ["config file 'nope.yaml'"]),
    "type": (f"{TEXT} --data.batch_size x", ["--data.batch_size is 'x'; give a whole number"]),
    "no model": ("plan --device h100", ["no model is named"]),
    "kind of data": (f"{TEXT} --data Images", ["data.context_length is not an option of Images"]),
    "net": (f"{TEXT} --model.gpt.num_heads 7", ["gpt.dim 128"]),
    "backbone": (f"plan -c configs/vision/mae_tiny.yaml {DIGITS} --model.backbone vit_foo", ["'vit_foo'"]),
    "strategy": (f"{TEXT} --trainer.strategy deepspeed", ["trainer.strategy is deepspeed", "fsdp2"]),
    "length": (f"{TEXT} --trainer.max_steps -1 --trainer.max_epochs 2", ["--train_samples"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(moa: Moa, case: str) -> None:  # noqa: F811
    line, parts = MISTAKES[case]
    outcome = moa(line)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert outcome.err.startswith("moa: ")
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize("option", ["--model.gpt.dept 8", "--data.batch_size x", "--model.ffn.gate tan", "stray"])
def test_a_mistake_is_what_a_fit_would_call_it(moa: Moa, option: str) -> None:  # noqa: F811
    fit = moa(f"fit -c configs/language/gpt_tiny.yaml -c configs/ffn/moa.yaml -c configs/data/stdlib.yaml {option}")
    assert fit.code == 2
    assert moa(f"{TEXT} {option}").err == fit.err


def test_the_help_names_every_option_and_device(moa: Moa) -> None:  # noqa: F811
    assert moa("plan --help").out == PLAN
    for action in _own_options()._actions:
        assert action.option_strings[0] in PLAN
    for name in DEVICES:
        assert name in PLAN
