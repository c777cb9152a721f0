"""A mistake in the input: one sentence on stderr, exit code 2, nothing left behind, nothing trained."""

import errno
import multiprocessing
import os
import shutil
import signal
from multiprocessing.reduction import DupFd, ForkingPickler
from pathlib import Path

import pytest
import torch
from torchvision.io import encode_png

from moa_lightning.cli import main
from moa_lightning.errors import UserError
from moa_lightning.mistakes import find_user_error, mistakes
from tests.cli.conftest import MAE, TEXT, VISION, Moa

FIT = f"{MAE} --trainer.max_steps 2 --run_dir run"
WRITE = f"{TEXT} --trainer.max_steps 2 --run_dir run"
DINO = "fit -c configs/vision/dino_tiny.yaml -c configs/data/mnist5k.yaml --trainer.max_steps 2 --run_dir run"
FOLDER = "fit -c configs/vision/mae_tiny.yaml -c configs/data/image_folder.yaml --trainer.max_steps 2 --run_dir run"
SAY = "generate --ckpt_path nowhere.ckpt --prompt a"
SHARDS = "fit -c configs/vision/mae_tiny.yaml -c configs/data/image_shards.yaml --trainer.max_steps 2 --run_dir run"

FILES = {
    "key.yaml": "trainer:\n  max_step: 3\n",
    "deep.yaml": "model:\n  init_args:\n    ffn:\n      gat: tanh\n",
    "view.yaml": "data:\n  init_args:\n    transform: {init_args: {scal: [0.1, 1.0]}}\n",
    "top.yaml": "trianer:\n  max_steps: 3\n",
    "word.yaml": "trainer: fast\n",
    "type.yaml": "model:\n  init_args:\n    optimizer: {lr: fast}\n",
    "broken.yaml": "model:\n  init_args: {ffn: {gate: tanh}\n",
    "list.yaml": "- a\n",
    "level.yaml": "model:\n  ffn: {gate: tanh}\n",
    "bad.tar": "this is no archive " * 99,
    "short.txt": "too short\n",
}


@pytest.fixture(autouse=True)
def _input_files() -> None:
    for name, content in FILES.items():
        Path(name).write_text(content)
    Path("empty").mkdir()
    torch.save({"weights": torch.zeros(2)}, "foreign.ckpt")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": [1]}, "state.ckpt")
    Path("words.txt").write_text("some words to learn from\n" * 60)


CASES = {
    # names
    "activation": (f"{FIT} --model.ffn.activation gelo", ["ffn.activation 'gelo'", "leaky_relu"]),
    "dictionary": (f"{FIT} --model.ffn.mixing la --model.ffn.dictionary [gelu,silo]", ["'silo'", "silu"]),
    "gate": (f"{FIT} --model.ffn.gate tan", ["--model.ffn.gate is 'tan'", "did you mean tanh?"]),
    "backbone": (f"{FIT} --model.backbone vit_foo", ["'vit_foo'"]),
    "task": (f"{FIT} --model MAEE", ["--model 'MAEE'", "did you mean MAE?"]),
    "data": (f"{FIT} --data Imagez", ["--data 'Imagez'", "did you mean Images?"]),
    "view": (f"{FIT} --data.transform Foo", ["--data.transform 'Foo'", "MultiCrop, RandAugment, SingleView"]),
    "command": ("fitt", ["'fitt'", "fit, validate"]),
    "module": (f"{FIT} --import no_such_module", ["--import 'no_such_module'"]),
    "callback": (f"{FIT} --trainer.callbacks+ Foo", ["trainer.callbacks", "'Foo' is unknown"]),
    "callback without argument": (
        f"{FIT} --trainer.callbacks+ EarlyStopping",
        ["EarlyStopping needs its monitor", "--trainer.callbacks.monitor"],
    ),
    "help": ("fit --model.help MAEE", ["did you mean MAE?"]),
    # config files
    "no file": (f"{FIT} -c nope.yaml", ["config file 'nope.yaml'", "working folder"]),
    "key": (f"{FIT} -c key.yaml", ["config file 'key.yaml': trainer.max_step ", "did you mean trainer.max_steps?"]),
    "deep key": (f"{FIT} -c deep.yaml", ["'deep.yaml': model.ffn.gat ", "did you mean model.ffn.gate?"]),
    "view key": (f"{FIT} -c view.yaml", ["data.transform.scal ", "of SingleView", "data.transform.scale?"]),
    "no group of options": (f"{FIT} -c word.yaml", ["'word.yaml': trainer is 'fast'; give a group of options"]),
    "top key": (f"{FIT} -c top.yaml", ["'top.yaml': trianer ", "did you mean trainer?"]),
    "type in file": (f"{FIT} -c type.yaml", ["'type.yaml': model.optimizer.lr is 'fast'; give a number"]),
    "no YAML": (f"{FIT} -c broken.yaml", ["'broken.yaml', line 3 is not valid YAML"]),
    "no mapping": (f"{FIT} -c list.yaml", ["'list.yaml' must hold keys and values"]),
    "level": (f"{FIT} -c level.yaml", ["model.ffn is not an option; write it under model.init_args"]),
    # command line
    "option": (f"{FIT} --trainer.max_step 3", ["--trainer.max_step ", "--trainer.max_steps?"]),
    "no abbreviation": (f"{FIT} --model.ffn.activatio silu", ["did you mean --model.ffn.activation?"]),
    "group": (f"{FIT} --trainr.max_steps 3", ["did you mean --trainer.max_steps?"]),
    "no group": (f"{FIT} --max_steps 3", ["did you mean --trainer.max_steps?"]),
    "other task": (f"{FIT} --model.gpt.depth 3", ["--model.gpt.depth is not an option of MAE"]),
    "set by the class": (f"{FIT} --data.shuffle_block 9", ["--data.shuffle_block is not an option of"]),
    "type": (f"{FIT} --data.batch_size x", ["--data.batch_size is 'x'; give a whole number"]),
    "no value": (f"{FIT} --trainer.max_steps", ["--trainer.max_steps needs a value"]),
    "stray word": (f"{FIT} extra", ["'extra' belongs to no option"]),
    "nothing": ("fit", ["no model is named", "DINO, ImageClassification, Joint, LanguageModeling, MAE"]),
    "no data": ("fit --model MAE", ["no data is named", "Images"]),
    "no end": ("fit --model MAE --data Images", ["the run has no end", "--trainer.max_steps"]),
    # numbers
    "rate": (f"{FIT} --model.optimizer.lr -1", ["optimizer.lr is -1", "finite number above 0"]),
    "mask": (f"{FIT} --model.mask_ratio 1.5", ["mask_ratio 1.5"]),
    "heads": (f"{FIT} --model.decoder_heads 0", ["model.decoder_heads is 0 but must be at least 1"]),
    "temperature": (f"{DINO} --model.student_temperature 0", ["model.student_temperature is 0.0 but must be above 0"]),
    "fraction": (f"{FIT} --data.val_fraction 2", ["val_fraction 2.0"]),
    "steps": (f"{FIT} --trainer.max_steps 0", ["trainer.max_steps is 0"]),
    "accumulate": (f"{FIT} --trainer.accumulate_grad_batches 0", ["trainer.accumulate_grad_batches is 0"]),
    "clip": (f"{FIT} --trainer.gradient_clip_val -1", ["trainer.gradient_clip_val is -1"]),
    "interval": (f"{FIT} --trainer.val_check_interval 0", ["trainer.val_check_interval is 0"]),
    "limit": (f"{FIT} --trainer.limit_val_batches 2.5", ["2.5", "limit_val_batches"]),
    "precision": (f"{FIT} --trainer.precision foo", ["--trainer.precision is 'foo'", "bf16-mixed"]),
    "strategy": (f"{FIT} --trainer.strategy foo", ["strategy='foo'"]),
    "devices": (f"{FIT} --trainer.devices 9999", ["trainer.devices is 9999", "CPU cores"]),
    "no device": (f"{FIT} --trainer.devices 0", ["trainer.devices is 0"]),
    # data
    "too large a batch": (f"{FIT} --data.batch_size 99999", ["batch_size is 99999", "samples"]),
    "missing images": (f"{FOLDER} --data.source nowhere", ["'nowhere'"]),
    "no images": (f"{FOLDER} --data.source empty", ["empty", "no images"]),
    "images left open": (FOLDER, ["data.source is left open"]),
    "missing text": (f"{WRITE} --data.source nowhere", ["'nowhere'"]),
    "no text": (f"{WRITE} --data.source empty", ["empty", "no files"]),
    "short text": (f"{WRITE} --data.source short.txt --data.context_length 64", ["bytes", "context_length 64"]),
    "no tar": (f"{SHARDS} --data.train bad.tar --data.val bad.tar --data.image_size 28", ["bad.tar", "tar"]),
    "shards left open": (SHARDS, ["train"]),
    "text for vision": ("fit --model MAE --data TextFiles --trainer.max_steps 2", ["TextFiles is text"]),
    "images for text": ("fit --model LanguageModeling --data Images --trainer.max_steps 2", ["is images"]),
    "one view": (f"{DINO} --data.transform SingleView", ["DINO", "--data.transform MultiCrop"]),
    # checkpoints
    "no checkpoint": (f"{FIT} --ckpt_path nope.ckpt", ["'nope.ckpt' does not exist"]),
    "no archive": (f"{FIT} --ckpt_path short.txt", ["'short.txt' is not a checkpoint"]),
    "foreign": (f"{FIT} --ckpt_path foreign.ckpt", ["'foreign.ckpt' is not a checkpoint"]),
    "last of nothing": (f"{FIT} --ckpt_path last", ["'run' holds no checkpoints/last.ckpt"]),
    "last of what": (f"fit {VISION} --ckpt_path last", ["--ckpt_path last needs --run_dir"]),
    "validate what": ("validate", ["moa validate needs --ckpt_path"]),
    # what the system refuses
    "folder below a file": (FIT.replace("--run_dir run", "--run_dir words.txt/run"), ["'words.txt/run'", "directory"]),
    "folder of nobody": (FIT.replace("--run_dir run", "--run_dir /proc/run"), ["'/proc/run' cannot be written"]),
    "shards below a file": ("data text --source words.txt --out words.txt/a", ["--out words.txt/a cannot be written"]),
    "tokens of nobody": ("data tokens --source words.txt --out /proc/a", ["--out /proc/a cannot be written"]),
    "tokenizer of nobody": (
        "data tokenizer --source words.txt --vocab_size 300 --out /proc/a/t.json",
        ["--out /proc/a/t.json cannot be written"],
    ),
    "grid into a file": ("ablate configs/grids/quickstart.yaml --out words.txt", ["'words.txt': ", "state.py, line "]),
    "seed": (f"{FIT} --seed_everything -1", ["--seed_everything is -1; give a whole number from 0"]),
    "seed of text": (f"{SAY} --seed 100000000000000000000", ["is no seed"]),
    "bytes": (f"{SAY} --prompt \udcff", ["--prompt is not text in UTF-8"]),
    "meta": (f"{SAY} --device meta", ["--device 'meta' computes no values"]),
    "list": ("export --ckpt_path list.ckpt --out net", ["'list.ckpt' holds no named tensors but a list"]),
    "other state": ("export --ckpt_path state.ckpt --out net", ["the checkpoint holds no net"]),
    # commands with options of their own
    "nothing to write": ("data text --source words.txt", ["moa data text: ", "--out", "moa data text --help lists"]),
    "abbreviation": ("data text --sourc words.txt --out shards", ["moa data text: ", "--source"]),
    "no kind": ("data texts", ["moa data: ", "'texts'", "tokenizer"]),
    "unknown option": ("ablate grid.yaml --job 2", ["moa ablate: ", "--job 2"]),
    "one word too many": ("report run grid", ["moa report: ", "grid"]),
    "abbreviated export": ("export --ckpt words.txt --out net", ["moa export: ", "--ckpt_path"]),
    "seed of theory": ("theory --seed -1", ["moa theory: ", "'-1' is no seed"]),
    "plan": ("plan --devices 0", ["moa plan: ", "'0' is not above 0"]),
    "no config": ("test --ckpt_path foreign.ckpt", ["no config.yaml lies beside 'foreign.ckpt'"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(moa: Moa, case: str) -> None:
    line, parts = CASES[case]
    before = set(Path().rglob("*"))
    outcome = moa(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("moa: ")
    assert outcome.err.count("\n") == 1
    assert len(outcome.err) < 500
    for part in parts:
        assert part in outcome.err
    # an index beside the shards is the data's own cache
    assert set(Path().rglob("*")) - before <= {Path("bad.tar.index.json")}


def test_images_of_mixed_size_are_named_before_a_step_is_taken(moa: Moa) -> None:
    Path("mixed").mkdir()
    for number in range(30):
        pixels = torch.full((3, 28 + number % 2, 32), 9 * number % 255, dtype=torch.uint8)
        Path(f"mixed/{number}.png").write_bytes(encode_png(pixels).numpy().tobytes())
    Path("whole.py").write_text(
        "import data\nclass Whole(data.View):\n    def build(self, size):\n        return [lambda image: image]\n"
    )
    line = f"{FOLDER} --data.source mixed --data.image_size 28 --data.batch_size 8"
    outcome = moa(f"{line} --import whole --data.transform whole.Whole")
    assert outcome.code == 2
    assert "images of different size" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not Path("run").exists()


def test_a_second_run_into_a_folder_is_refused_and_changes_nothing(moa: Moa) -> None:
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model: {}\n")
    outcome = moa(FIT)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "already holds a run; continue it with --ckpt_path last" in outcome.err
    assert [path.name for path in Path("run").iterdir()] == ["config.yaml"]


def test_files_that_were_in_the_folder_survive_a_mistake(moa: Moa) -> None:
    Path("run").mkdir()
    Path("run/log.txt").write_text("mine")
    assert moa(f"{FIT} --model.backbone vit_foo").code == 2
    assert [path.name for path in Path("run").iterdir()] == ["log.txt"]


def test_a_failed_run_removes_its_own_files_and_no_others(moa: Moa) -> None:
    """While it starts, other programs write into its folder: another fit, an editor."""
    Path("meanwhile.py").write_text(
        "from pathlib import Path\nimport tasks\n"
        "class Meanwhile(tasks.MAE):\n    def build(self, seed):\n"
        "        for name in ('notes.txt', 'mae/a/config.yaml', 'checkpoints/old/config.yaml', 'mae/new/.lock'):\n"
        "            Path('runs', name).parent.mkdir(parents=True, exist_ok=True)\n"
        "            Path('runs', name).touch()\n"
        "        raise ZeroDivisionError('a bug')\n"
    )
    fit = f"{FIT.replace('--run_dir run', '--run_dir runs')} --import meanwhile --model Meanwhile"
    others = {"mae/a/config.yaml", "checkpoints/old/config.yaml", "mae/new/.lock"}
    for existed in (True, False):
        if existed:
            Path("runs").mkdir()
        with pytest.raises(ZeroDivisionError, match="a bug"):
            main(fit.split())
        left = {str(path.relative_to("runs")) for path in Path("runs").rglob("*") if path.is_file()}
        assert left == others | ({"notes.txt"} if existed else set())
        shutil.rmtree("runs")


def test_a_run_that_fails_before_its_first_step_removes_all_it_wrote(moa: Moa, words: None) -> None:
    """Everything that is written at the start, into a folder that was there."""
    assert moa("data tokenizer --source words.txt --vocab_size 280 --out t.json").code == 0
    assert moa("data tokens --source words.txt --tokenizer t.json --out tokens").code == 0
    Path("early.py").write_text(
        "from pathlib import Path\nimport tasks\n"
        "class Early(tasks.LanguageModeling):\n    def on_train_batch_start(self, batch, batch_idx):\n"
        "        Path('seen').write_text(' '.join(path.name for path in Path('run').iterdir()))\n"
        "        raise ZeroDivisionError('a bug')\n"
    )
    Path("run").mkdir()
    Path("run/notes.txt").touch()
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(
            f"{TEXT} -c configs/data/token_files.yaml --data.source tokens --import early --model Early "
            "--run_dir run".split()
        )
    assert {"config.yaml", "tokenizer.json", "metrics.csv"} <= set(Path("seen").read_text().split())
    assert [path.name for path in Path("run").iterdir()] == ["notes.txt"]


def test_a_bug_keeps_its_traceback_and_leaves_no_folder() -> None:
    Path("buggy.py").write_text(
        "import tasks\nclass Buggy(tasks.MAE):\n    def build(self, seed):\n        raise ZeroDivisionError('a bug')\n"
    )
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(f"{FIT} --import buggy --model Buggy".split())
    assert not Path("run").exists()


def test_a_module_that_fails_to_import_another_keeps_its_traceback() -> None:
    Path("incomplete.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        main(f"{FIT} --import incomplete".split())


def test_a_worker_that_dies_while_its_batch_is_fetched_is_one_sentence() -> None:
    here, there = multiprocessing.Pipe()

    def announce_and_die() -> None:
        there.send_bytes(ForkingPickler.dumps(DupFd(0)))
        os.kill(os.getpid(), signal.SIGKILL)

    worker = multiprocessing.get_context("fork").Process(target=announce_and_die)
    worker.start()
    worker.join()
    announced = ForkingPickler.loads(here.recv_bytes())
    with pytest.raises(UserError, match=r"a process that reads data died \(exited unexpectedly\)"), mistakes([], []):
        announced.detach()


def test_a_mistake_found_by_a_data_worker_is_the_sentence_alone() -> None:
    trace = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
    found = find_user_error(UserError(f"{trace}moa_lightning.errors.UserError: image 3 is broken"))
    assert str(found) == "image 3 is broken"


def test_a_mistake_behind_other_exceptions_is_found() -> None:
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = UserError("the reason")
    assert str(find_user_error(wrapped)) == "the reason"
    assert find_user_error(RuntimeError("alone")) is None


def test_a_full_disk_is_one_sentence_and_leaves_nothing(moa: Moa, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("data.token_writer.SplitFile.add", full)
    before = set(Path().iterdir())
    outcome = moa("data tokens --source words.txt --out tokens")
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "--out tokens cannot be written (No space left on device)" in outcome.err
    assert set(Path().iterdir()) == before


def test_a_reader_that_has_gone_ends_the_command_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        monkeypatch.setattr("sys.stdout", output)
        assert main(["fit", "--help"]) == 141
    monkeypatch.undo()
    assert capfd.readouterr().err == ""
