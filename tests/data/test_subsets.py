"""Little data: how many images of a class are kept, which, and what is refused."""

import pytest
import torch

from data import Images
from data.subsets import long_tail
from moa_lightning.errors import UserError
from tests.data.conftest import write_pictures


def kept(**options):
    module = Images("mnist5k", batch_size=4, **options)
    module.setup()
    return module, set(module.splits["train"].images.indices.tolist()), module.splits["train"].labels


def test_long_tails_are_those_of_the_published_sets():
    """CIFAR-10 at factor 100 and 10, as Cui et al. count."""
    assert long_tail(5000, 100, 10) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail(5000, 10, 10) == [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]


def test_so_many_of_each_class_and_the_smaller_choice_inside_the_larger():
    small, few, labels = kept(per_class=5)
    large, more, _ = kept(per_class=12, seed=3)
    assert torch.bincount(labels).tolist() == [5] * 10
    assert few < more
    assert (small.val_samples, small.describe()["bank_samples"]) == (750, 50)
    assert small.describe()["training_images"] == "5 of each class, subset seed 0"
    assert torch.equal(small.splits["val"].labels, large.splits["val"].labels)
    moved, other, _ = kept(per_class=5, subset_seed=1)
    assert len(other & few) < 25  # of images that are drawn anew: one in seventy
    for split in ("val", "test"):  # a net that was pre-trained on all training images has seen none of them
        assert torch.equal(moved.splits[split].images.indices, small.splits[split].images.indices)


def test_a_long_tail_out_of_the_smallest_class_or_of_a_given_size():
    assert torch.bincount(kept(imbalance=10)[2]).tolist() == long_tail(350, 10, 10)
    module, _, labels = kept(per_class=100, imbalance=10)
    assert torch.bincount(labels).tolist() == long_tail(100, 10, 10)
    assert module.describe()["training_images"] == "100 to 10 of a class, imbalance 10, subset seed 0"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"per_class": 0}, "per_class is 0"),
        ({"imbalance": 0.5}, "imbalance is 0.5"),
        ({"per_class": 351}, "class 0 has 350 training images, and 351 are asked for"),
        ({"per_class": 50, "imbalance": 100}, "class 8 would keep no training image"),
        ({"per_class": 1}, "lower it or give more data"),
    ],
)
def test_what_makes_no_sense_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        Images("mnist5k", batch_size=16, **options).setup()


def test_images_without_labels_are_refused(tmp_path):
    write_pictures(tmp_path / "plain", 6)
    with pytest.raises(UserError, match="the training images have none"):
        Images(str(tmp_path / "plain"), image_size=16, batch_size=2, per_class=2).setup()
