"""Fragments: how they are found and merged, and that each shipped one fits the code."""

import itertools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from moa_lightning import FFNConfig, UserError
from moa_lightning.configs import Fragment, compose, load_config, lookup, merge, origin, resolve_config
from moa_lightning.lightning_cli import DEFAULT_CLASSES, option_roots
from moa_lightning.options import Option, Tree
from tests.cli.conftest import Moa

ROOT = Path(__file__).parents[2]


def names(folder: str) -> list[str]:
    return sorted(f"configs/{folder}/{path.name}" for path in (ROOT / "configs" / folder).glob("*.yaml"))


FFN, TRAINER = names("ffn"), names("trainer")
MODULES = {
    "vision": ("Images", "ImageShards"),
    "language": ("TextFiles", "TextShards", "TokenFiles", "Mixture", "TextTask"),
}


def data_of(kind: str) -> list[str]:
    """Data fragments for the tasks of a kind."""
    classes = {path: yaml.safe_load((ROOT / path).read_text())["data"]["class_path"] for path in names("data")}
    return [path for path, found in classes.items() if found.removeprefix("data.") in MODULES[kind]]


def each_once(*groups: list[str]) -> list[tuple[str, ...]]:
    """As few combinations as meet every member of every group."""
    return list(itertools.islice(zip(*map(itertools.cycle, groups), strict=True), max(map(len, groups))))


PAIRS = [pair for kind in MODULES for pair in each_once(names(kind), data_of(kind))]
LEFT_OPEN = ("image_folder", "imagenet_folder", "imagenette", "text_files", "token_files", "text_90_10")


def test_every_combination_of_fragments_names_existing_options_only() -> None:
    every_pair = [pair for kind in MODULES for pair in itertools.product(names(kind), data_of(kind))]
    assert len(every_pair) >= 10
    rest = each_once(FFN, TRAINER, names("optimizer"))  # none speaks of data, so each is met with every task
    with_each = [(task, data) for kind in MODULES for task, data in itertools.product(names(kind), data_of(kind)[:1])]
    combinations = [(*pair, *rest[0]) for pair in every_pair] + [
        (*pair, *layer) for pair, layer in itertools.product(with_each, rest)
    ]
    for task, data, ffn, trainer, optimizer in combinations:
        fragments = [load_config(path) for path in (ffn, data, optimizer, trainer, task)]
        tree = Tree(option_roots("fit"), compose(fragments), fragments, DEFAULT_CLASSES)
        options = tree.enter_classes([Option("data.source", "x")] if Path(data).stem in LEFT_OPEN else [])
        tree.check(options)
        assert tree.notes == [], (task, data, ffn, trainer, optimizer)


REQUIRED = {
    **dict.fromkeys(LEFT_OPEN, "--data.source x"),
    **dict.fromkeys(("image_shards", "imagenet_shards", "text_shards"), "--data.train a.tar --data.val b.tar"),
}


@pytest.mark.parametrize(("task", "data"), PAIRS)
def test_values_of_task_and_data_fragments_have_the_types_of_the_code(moa: Moa, task: str, data: str) -> None:
    options = REQUIRED.get(Path(data).stem, "")
    outcome = moa(f"fit -c {task} -c {data} -c configs/trainer/cpu.yaml {options} --print_config")
    assert (outcome.code, outcome.err) == (0, "")
    assert yaml.safe_load(outcome.out)["model"]["class_path"].startswith("tasks.")


@pytest.mark.parametrize("trainer", TRAINER)
def test_values_of_trainer_fragments_have_the_types_of_the_code(moa: Moa, trainer: str) -> None:
    outcome = moa(f"fit -c {trainer} -c configs/vision/mae_tiny.yaml -c configs/data/mnist5k.yaml --print_config")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize("path", FFN)
def test_an_ffn_fragment_is_an_ffn_config_and_says_in_full_what_it_is(path: str) -> None:
    given = load_config(path).content["model"]["init_args"]["ffn"]
    assert FFNConfig(**given).as_dict().items() >= given.items()
    # merged over another one key by key, it must win everywhere
    shape = {"hidden_ratio", "multiple_of", "bias", "kernel"}  # these are the task's and the machine's business
    places = {"attention_gate", "pointwise_norm"}  # fragments of their own, that any of these goes with
    assert set(given) == set(FFNConfig.__dataclass_fields__) - shape - places


@pytest.mark.parametrize("path", names("places"))
def test_a_place_fragment_sets_one_place(path: str) -> None:
    (given,) = load_config(path).content["model"]["init_args"]["ffn"].items()
    assert "_".join(given) == Path(path).stem
    assert FFNConfig(**dict([given])) != FFNConfig()


def test_the_order_of_fragments_and_options_does_not_matter(moa: Moa) -> None:
    parts = [
        "-c configs/ffn/moa_tanh.yaml",
        "-c configs/vision/dino_tiny.yaml",
        "-c configs/data/mnist5k.yaml",
        "--model.ffn.gate softmax",
    ]
    lines = [f"fit {' '.join(order)} --print_config" for order in itertools.permutations(parts)]
    config, *others = [yaml.safe_load(moa(line).out) for line in lines]
    assert all(other == config for other in others)
    assert config["model"]["init_args"]["ffn"]["gate"] == "softmax"
    transform = config["data"]["init_args"]["transform"]
    assert transform["class_path"] == "data.MultiCrop"
    assert transform["init_args"]["flip"] == 0.0


@pytest.mark.parametrize(
    "line",
    [
        "--model MAE --data Images -c configs/data/mnist5k.yaml -c configs/ffn/moa.yaml",
        "-c configs/ffn/moa.yaml --data.source mnist5k --data Images --data.transform.flip 0 --model=MAE",
        "--model.class_path tasks.MAE --model.init_args.seed 3 -c configs/ffn/moa.yaml -c configs/data/mnist5k.yaml",
    ],
)
def test_classes_go_by_short_names_wherever_they_stand(moa: Moa, line: str) -> None:
    config = yaml.safe_load(moa(f"fit {line} --model.ffn.gate tanh --print_config").out)
    assert config["model"]["class_path"] == "tasks.MAE"
    ffn = config["model"]["init_args"]["ffn"]
    assert (ffn["mixing"], ffn["gate"]) == ("moa", "tanh")
    transform = config["data"]["init_args"]["transform"]
    assert (transform["class_path"], transform["init_args"]["flip"]) == ("data.SingleView", 0.0)


def test_options_of_a_replaced_class_go_with_it(moa: Moa) -> None:
    line = "fit -c configs/vision/mae_tiny.yaml -c configs/data/mnist5k.yaml --data.transform MultiCrop --print_config"
    transform = yaml.safe_load(moa(line).out)["data"]["init_args"]["transform"]
    assert transform["class_path"] == "data.MultiCrop"
    assert transform["init_args"]["flip"] == 0.0  # of mnist5k.yaml, which names no class
    assert "scale" not in transform["init_args"]  # of SingleView in mae_tiny.yaml


def test_merge_goes_key_by_key_and_joins_callbacks() -> None:
    base = {"trainer": {"max_steps": 1, "callbacks": ["a"], "betas": [1, 2]}, "seed": 0}
    update = {"trainer": {"callbacks": ["b"], "betas": [3]}}
    assert merge(base, update) == {"trainer": {"max_steps": 1, "callbacks": ["a", "b"], "betas": [3]}, "seed": 0}


def test_the_file_that_decides_about_an_option_is_known() -> None:
    first = Fragment("first", {"model": {"init_args": {"ffn": {"gate": "tanh"}}}})
    second = Fragment("second", {"model": {"class_path": "tasks.MAE"}})
    assert lookup(first.content, "model.ffn.gate") == "tanh"
    assert origin([first, second], "model.ffn.gate") is first
    assert origin([first, second], "model.ffn.bias") is None


def test_numbers_such_as_1e_3_are_numbers(tmp_path: Path) -> None:
    Path("a.yaml").write_text("a: 1e-3\nb: -2E+4\nc: e3\nd: 1.5e3\n")
    assert load_config("a.yaml").content == {"a": 0.001, "b": -20000.0, "c": "e3", "d": 1500.0}


def test_a_key_that_stands_twice_is_refused() -> None:
    Path("a.yaml").write_text("trainer:\n  max_steps: 1\n  max_steps: 2\n")
    with pytest.raises(UserError, match=r"line 3.*max_steps.*twice"):
        load_config("a.yaml")


def test_the_working_folder_comes_before_the_package(tmp_path: Path) -> None:
    inside = resolve_config("configs/ffn/moa.yaml")
    assert inside.is_file()
    assert tmp_path not in inside.parents
    Path("configs/ffn").mkdir(parents=True)
    Path("configs/ffn/moa.yaml").write_text("{}")
    assert resolve_config("configs/ffn/moa.yaml").resolve() == tmp_path / "configs/ffn/moa.yaml"


def test_a_wheel_carries_the_configs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-q", "-w", "."]
    subprocess.run(command, check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall("site")
    shipped = {path.relative_to("site/moa_lightning") for path in Path("site").rglob("configs/**/*.yaml")}
    assert shipped == {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    script = "import moa_lightning.configs as c; print(c.resolve_config('configs/ffn/moa.yaml'))"
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {['site', *sys.path]!r}; {script}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert Path(found.stdout.strip()).resolve() == tmp_path / "site/moa_lightning/configs/ffn/moa.yaml"
