"""LearnedMixes: numbers by token class follow the formula, pictures come at their times, watching leaves no trace."""

import io
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from moa_lightning.activations import pointwise
from moa_lightning.callbacks import LearnedMixes
from moa_lightning.callbacks.learned_mixes import Ends, Seen, most_different, patch_examples, text_examples
from moa_lightning.callbacks.mixing import curve_points, histogram_of
from moa_lightning.evaluation.token_classes import TokenClasses, patch_classes, text_classes
from moa_lightning.feedforward import FFNConfig

from .toy import ToyTask, events, fit, toy_loader

NAMES = ("identity", "gelu", "relu")
WORD = list("if 1.")


def config(**options):
    return FFNConfig(**({"mixing": "moa", "dictionary": NAMES} | options))


class TextTask(ToyTask):
    """Its samples are said to be the text WORD."""

    def token_classes(self, batch) -> TokenClasses:
        return text_classes([WORD] * len(batch["x"]))


def randomised(task: ToyTask) -> ToyTask:
    for block in task.net.blocks:
        for mix in block.mlp.mixings().values():
            torch.nn.init.normal_(mix.gate_weight)
    return task


def mixing_json(folder):
    return json.loads((folder / "mixing.json").read_text())


def test_means_and_entropies_by_class_are_those_of_the_formula(tmp_path):
    task = randomised(TextTask(config()))
    fit(task, tmp_path / "run", [LearnedMixes()], max_steps=4)
    found = mixing_json(tmp_path / "run")
    assert (found["step"], list(found["layers"])) == (4, ["block00/up", "block01/up"])
    layer = found["layers"]["block00/up"]
    assert layer["module"] == "blocks.0.mlp.up_mix"
    x = next(iter(toy_loader(8, seed=1)))["x"].double()  # the validation's first batch
    mix = task.net.blocks[0].mlp.up_mix
    p = torch.sigmoid(x @ mix.gate_weight.detach().double().T)
    coefficients = (mix.base.detach().double() + p - 0.5).flatten(0, 1)
    entropy = -(p * p.log2() + (1 - p) * (1 - p).log2()).mean(-1)  # (B, T)
    np.testing.assert_allclose(layer["mean"], coefficients.mean(0), rtol=1e-5)
    np.testing.assert_allclose(layer["std"], coefficients.std(0, correction=0), rtol=1e-5)
    assert layer["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    by_class = {"keywords": entropy[:, :2], "whitespace": entropy[:, 2], "digits": entropy[:, 3]}
    by_class["punctuation"] = entropy[:, 4]
    assert set(layer["entropy_by_class"]) == set(by_class)
    for name, values in by_class.items():
        assert layer["entropy_by_class"][name] == pytest.approx(values.mean().item(), rel=1e-5)
    assert layer["class_shares"]["keywords"] == pytest.approx(0.4)
    points = events(tmp_path / "run").Scalars("mixing/block00/up/entropy/keywords")
    assert points[-1].value == pytest.approx(by_class["keywords"].mean().item(), rel=1e-5)


def images(folder, tag):
    return [(e.step, np.asarray(Image.open(io.BytesIO(e.encoded_image_string)))) for e in events(folder).Images(tag)]


def test_pictures_and_examples_come_past_the_quarters_and_at_the_end(tmp_path):
    task = randomised(TextTask(config(form="gated", branches="both")))
    fit(task, tmp_path / "run", [LearnedMixes()], max_steps=12, val_check_interval=1)
    found = images(tmp_path / "run", "mixing/training")
    assert [step for step, _ in found] == [2, 5, 8, 11]
    assert all(picture.shape[1] <= 1200 and picture.std() > 0 for _, picture in found)
    files = sorted(path.name for path in (tmp_path / "run").glob("*/mixing-*"))
    steps = ("000006", "000009", "000012")  # the latest three
    assert files == sorted([f"mixing-{name}-step{step}.{end}" for name, end in KINDS for step in steps])
    text = (tmp_path / "run/samples/mixing-tokens-step000012.txt").read_text()
    assert "⟦1⟧." in text


KINDS = (("training", "png"), ("tokens", "txt"))


def test_la_has_curves_and_no_examples_and_a_fixed_net_nothing(tmp_path):
    fit(TextTask(config(mixing="la")), tmp_path / "la", [LearnedMixes()], max_steps=4)
    assert [path.name for path in (tmp_path / "la").glob("*/mixing-*")] == ["mixing-training-step000004.png"]
    assert mixing_json(tmp_path / "la")["layers"]["block00/up"]["entropy"] is None
    fit(TextTask(FFNConfig()), tmp_path / "fixed", [LearnedMixes()], max_steps=4)
    assert not (tmp_path / "fixed/mixing.json").exists()


def test_pairs_are_in_the_file(tmp_path):
    task = randomised(TextTask(config(form="gated", branches="pairs")))
    fit(task, tmp_path / "run", [LearnedMixes()], max_steps=4)
    layer = mixing_json(tmp_path / "run")["layers"]["block00/pair"]
    assert np.asarray(layer["mean"]).shape == (3, 3)
    assert layer["pre_activation_within_4"] is None


def test_watching_changes_nothing_and_leaves_no_hook(tmp_path):
    tasks = []
    for watchers in ([], [LearnedMixes()]):
        torch.manual_seed(3)
        tasks.append(randomised(TextTask(config())))
        fit(tasks[-1], tmp_path / f"run{len(watchers)}", watchers)
    assert all(torch.equal(p, q) for p, q in zip(tasks[0].parameters(), tasks[1].parameters(), strict=True))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tasks[1].modules())


def test_hooks_do_not_survive_an_error(tmp_path):
    task = TextTask(config())
    task.validation_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit(task, tmp_path / "run", [LearnedMixes()], num_sanity_val_steps=0)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.modules())


def test_a_resumed_run_remembers_its_earlier_curves(tmp_path):
    def saver(folder):
        return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=6, save_top_k=-1)

    whole, first, second = LearnedMixes(), LearnedMixes(), LearnedMixes()
    options = {"max_steps": 18, "val_check_interval": 5}  # a quarter has passed before the checkpoint
    task = randomised(TextTask(config()))
    start = {name: value.clone() for name, value in task.state_dict().items()}
    fit(task, tmp_path / "whole", [whole], **options)
    task = TextTask(config())
    task.load_state_dict(start)
    fit(task, tmp_path / "cut", [first, saver(tmp_path / "ckpt")], **options)
    fit(TextTask(config()), tmp_path / "cut", [second], ckpt_path=str(tmp_path / "ckpt/step=6.ckpt"), **options)
    assert set(whole._marks) == {"0.25", "0.5", "0.75"}
    assert second._marks == whole._marks
    assert mixing_json(tmp_path / "cut") == mixing_json(tmp_path / "whole")


def test_the_histogram_counts_what_lies_within_the_curve():
    u = torch.tensor([[-5.0, 0.01, 0.02, 3.99], [9.0, -3.99, 0.01, 0.01]])
    shares, edges = histogram_of(u), curve_points()
    expected, _ = np.histogram(u.numpy(), edges)
    np.testing.assert_allclose(shares.numpy(), expected / 8)
    assert shares.sum().item() == pytest.approx(6 / 8)


def seen_between(low: list[float], high: list[float], weights: torch.Tensor) -> Seen:
    """Mixes on the line between two, at weights (B, T)."""
    ends = torch.tensor([low, high], dtype=torch.float64)
    return Seen(ends[0] + weights[..., None].double() * (ends[1] - ends[0]), None)


def test_most_different_tokens_are_the_ends_of_the_line_that_mixes_lie_on():
    weights = torch.tensor([[0.5, 0.1, 0.9], [0.4, 0.0, 1.0]])
    found = most_different(seen_between([1.0, 0.0, 0.0], [1.0, 0.0, 2.0], weights), NAMES)
    assert found.share == pytest.approx(1.0)
    assert found.order.tolist() == weights.flatten().argsort().tolist()  # more ReLU is a higher curve
    u = torch.from_numpy(curve_points())
    np.testing.assert_allclose(found.curves[5], u + 2 * pointwise("relu").function(u))
    assert most_different(seen_between([1.0, 0, 0], [1.0, 0, 0], weights), NAMES) is None


def test_text_examples_stand_marked_in_their_place():
    ends = Ends(0.7, np.array([4, 1, 0, 3, 2, 5]), np.zeros((6, len(curve_points()))))
    lines = text_examples("block00/up", ends, [["a", "b", "\n"], ["b", "c", "d"]]).splitlines()
    assert lines[0].startswith("block00/up: 70%")
    assert [line.strip() for line in lines[2:7]] == ["b⟦c⟧d", "a⟦b⟧⏎", "⟦a⟧b⏎", "ab⟦⏎⟧", "bc⟦d⟧"]  # b once
    assert [line.strip() for line in lines[8:10]] == ["bc⟦d⟧", "ab⟦⏎⟧"]


def test_patch_examples_leave_out_prefix_tokens_and_repeat_no_image():
    classes = patch_classes(torch.rand(2, 3, 2, 4), patch=2, prefix=1)  # 3 tokens an image
    ends = Ends(1.0, np.array([0, 2, 1, 4, 3, 5]), np.zeros((6, len(curve_points()))))
    rows = patch_examples("block00/up", ends, classes)
    assert [shown for _, shown in rows] == [[(0, 1), (1, 0)], [(1, 1), (0, 0)]]
