"""The help texts: at once, and true."""

import re
import subprocess
import sys

import pytest

from moa_lightning.configs import resolve_config
from moa_lightning.help import COMMAND_HELP, USAGE
from moa_lightning.lightning_cli import DEFAULT_CLASSES, option_roots
from moa_lightning.options import Tree
from tests.cli.conftest import Moa


@pytest.mark.parametrize("command", COMMAND_HELP)
def test_every_option_of_the_help_exists(command: str) -> None:
    known: set[str] = {"help", "config"}
    for model, data in (("MAE", "Images"), ("ImageClassification", "Images"), ("LanguageModeling", "TextFiles")):
        config = {"model": {"class_path": model}, "data": {"class_path": data}}
        known |= set(Tree(option_roots(command), config, [], DEFAULT_CLASSES).keys())
    named = set(re.findall(r"--([a-z_][\w.]*\w)", COMMAND_HELP[command])) - {"model.help", "data.help", "option"}
    assert len(named) >= 8
    assert named <= known


def test_the_configs_of_the_help_exist() -> None:
    for text in (USAGE, *COMMAND_HELP.values()):
        for path in re.findall(r"-c (configs/\S+\.yaml)", text):
            assert resolve_config(path).is_file()


def test_help_is_short_and_groups_stand_in_it(moa: Moa) -> None:
    assert moa("--help").out == USAGE
    text = moa("fit --help").out
    assert len(text.splitlines()) < 60
    assert [group for group in ("--model.*", "--data.*", "--trainer.*", "--run_dir", "--help all") if group in text]
    assert "--trainer.barebones" in moa("fit --help all").out
    assert "--model.mask_ratio" in moa("fit --model.help MAE").out
    assert "--data.bank_size" in moa("fit --data.help Images").out


def test_help_needs_no_torch() -> None:
    script = "import sys; from moa_lightning.cli import main; main(['fit', '--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True)
