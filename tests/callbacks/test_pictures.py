"""Pictures and texts of a task in TensorBoard and as files."""

import io

import numpy as np
import torch
from PIL import Image

from moa_lightning.callbacks import Pictures

from .toy import ToyTask, events, fit, toy_loader


class Remembering(ToyTask):
    """Keeps what it was asked with, and draws from the global random state as a careless task would."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def pictures(self, batch):
        assert not self.training
        assert not torch.is_grad_enabled()
        torch.rand(3)
        self.asked.append(batch["x"].clone())
        return {
            "input/first": torch.full((3, 4, 6), 2.0),
            "ramp": torch.linspace(0, 1, 3)[:, None, None].expand(3, 2, 2),
        }

    def texts(self):
        return {"sample": "def f(x):\n    return <x>"}


def test_pictures_and_texts_reach_tensorboard_and_the_folder(tmp_path):
    fit(Remembering(), tmp_path / "run", [Pictures()])
    log = events(tmp_path / "run")
    assert [e.step for e in log.Images("pictures/ramp")] == [3, 7]
    pixels = np.asarray(Image.open(io.BytesIO(log.Images("pictures/ramp")[0].encoded_image_string)))
    assert pixels.shape == (2, 2, 3)
    assert pixels[0, 0].tolist() == [0, 128, 255]
    assert [e.step for e in log.Tensors("samples/sample/text_summary")] == [3, 7]
    shown = log.Tensors("samples/sample/text_summary")[0].tensor_proto.string_val[0].decode()
    assert shown == "    def f(x):\n        return <x>"
    names = sorted(str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").glob("*/*"))
    assert names == [
        *(f"pictures/{name}-step{step:06d}.png" for name in ("input-first", "ramp") for step in (4, 8)),
        *(f"samples/sample-step{step:06d}.txt" for step in (4, 8)),
    ]
    assert (tmp_path / "run/samples/sample-step000004.txt").read_text() == "def f(x):\n    return <x>"
    assert np.asarray(Image.open(tmp_path / "run/pictures/input-first-step000004.png")).min() == 255  # 2.0 is clipped


def test_the_task_sees_the_first_query_batch_each_time(tmp_path):
    task = Remembering()
    bank, query = toy_loader(8, seed=5), toy_loader(12, seed=6)
    fit(task, tmp_path / "run", [Pictures(samples=3)], val=[bank, query])
    assert len(task.asked) == 2
    assert all(torch.equal(x, next(iter(query))["x"][:3]) for x in task.asked)


def test_only_every_nth_validation_is_shown_and_only_the_latest_kept(tmp_path):
    task = Remembering()
    fit(task, tmp_path / "run", [Pictures(every_n_validations=2, keep=2)], max_steps=16, val_check_interval=2)
    assert len(task.asked) == 4
    files = sorted(file.name for file in (tmp_path / "run/pictures").glob("ramp-*"))
    assert files == ["ramp-step000012.png", "ramp-step000016.png"]


def test_drawing_leaves_the_random_state_alone(tmp_path):
    class Noisy(Remembering):
        def training_step(self, batch, batch_idx):
            return super().training_step({"x": batch["x"] + torch.rand(()), "y": batch["y"]}, batch_idx)

    weights = []
    for name, callbacks in (("a", []), ("b", [Pictures()])):
        torch.manual_seed(3)
        task = Noisy()
        fit(task, tmp_path / name, callbacks)
        weights.append(torch.nn.utils.parameters_to_vector(task.parameters()))
    assert torch.equal(*weights)
