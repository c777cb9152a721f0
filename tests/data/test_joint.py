"""Two data modules side by side: turns, passes over either source, and where a run goes on with other devices."""

from collections import Counter
from typing import Any

import pytest

import data
from moa_lightning import UserError

BATCH = {"vision": 4, "language": 2}
STEPS = 30


@pytest.fixture
def make(tmp_path, class_folder):
    """make(**options): 28 training images and 9 windows of text."""
    (tmp_path / "book.txt").write_bytes(bytes(1 + n % 255 for n in range(10 * 14 + 3)))

    def build(**options: Any) -> data.Joint:
        images = data.Images(str(class_folder), image_size=16, batch_size=BATCH["vision"], seed=1)
        text = data.TextFiles(
            str(tmp_path / "book.txt"), context_length=10, batch_size=BATCH["language"], seed=2, val_fraction=0.15
        )
        return data.Joint(images, text, **options)

    return build


def seen(module: data.Joint, first: int, steps: int) -> list[dict[str, list[int]]]:
    """Ids of the batches of some steps, epoch after epoch, as the Trainer asks for them."""
    found: list[dict[str, list[int]]] = []
    progress = module.trainer.fit_loop.epoch_loop.batch_progress.total
    progress.processed = first
    while len(found) < steps:
        for batch, _, _ in iter(module.train_dataloader()):
            found.append({d: b["id"].tolist() for d, b in batch.items() if b is not None})
            progress.processed += 1
            if len(found) == steps:
                break
    return found


def attached(module: data.Joint, as_rank, *place: int) -> data.Joint:
    as_rank(module, *place)
    module.setup("fit")
    return module


@pytest.mark.parametrize("ratio", [(1, 1), (2, 3), (1, 4)])
def test_either_domain_goes_through_its_samples_once_an_epoch_at_its_own_rate(make, as_rank, ratio) -> None:
    module = attached(make(vision_ratio=ratio[0], language_ratio=ratio[1]), as_rank)
    found = seen(module, 0, STEPS)
    for domain, own in zip(("vision", "language"), ratio, strict=True):
        batches = [step[domain] for step in found if domain in step]
        assert len(batches) == STEPS * own // max(ratio)
        length = module.parts[domain].train_samples // BATCH[domain]
        for start in range(0, len(batches) - length + 1, length):
            counts = Counter(index for batch in batches[start : start + length] for index in batch)
            assert set(counts.values()) == {1}
            assert len(counts) == length * BATCH[domain]
        alone = as_rank(type(module.parts[domain]).__new__(type(module.parts[domain])))  # the module by itself
        alone.__dict__ = {**module.parts[domain].__dict__, "trainer": alone.trainer}
        first = [batch["id"].tolist() for batch in alone.train_dataloader()]
        assert batches[:length] == first[: len(batches)]


@pytest.mark.parametrize("stop", [1, 7, 13])
def test_a_run_goes_on_where_it_stopped_with_another_number_of_devices(make, as_rank, stop) -> None:
    options = {"vision_ratio": 2, "language_ratio": 3, "epoch_steps": 5}
    whole = seen(attached(make(**options), as_rank), 0, STEPS)
    ranks = [seen(attached(make(**options), as_rank, rank, 2), stop, STEPS - stop) for rank in range(2)]
    for step, *parts in zip(whole[stop:], *ranks, strict=True):
        assert all(part.keys() == step.keys() for part in parts)
        for domain, ids in step.items():
            assert [index for part in parts for index in part[domain]] == ids


def test_a_domain_without_a_share_is_not_read(make, as_rank) -> None:
    module = attached(make(vision_ratio=0), as_rank)
    assert all(step.keys() == {"language"} for step in seen(module, 0, 9))
    assert module.batch_size == BATCH["language"]
    assert len(module.val_dataloader()) == 3  # bank, query, text: it is still judged


def test_an_epoch_is_as_long_as_the_longer_domain_needs(make, as_rank) -> None:
    module = attached(make(language_ratio=2), as_rank)
    images, windows = (module.parts[domain].train_samples for domain in ("vision", "language"))
    assert len(list(module.train_dataloader())) == module.steps() == max(2 * (images // 4), windows // 2)


@pytest.mark.parametrize(
    "options", [{"vision_ratio": 0, "language_ratio": 0}, {"vision_ratio": -1}, {"epoch_steps": 0}]
)
def test_options_that_make_no_sense_are_refused(make, options) -> None:
    with pytest.raises(UserError, match="give"):
        make(**options)


def test_what_is_wrong_in_a_part_names_the_part(make, as_rank) -> None:
    module = make()
    module.parts["language"].batch_size = 500
    with pytest.raises(UserError, match=r"data\.language: batch_size is 500"):
        attached(module, as_rank)
