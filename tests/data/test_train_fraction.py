"""A share of the training data: exact, nested, whatever the run's seed; held-out data and the whole are as before."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DataModule, Images, ImageShards, Joint, LabelledFiles, Mixture, TextFiles, TextShards, TokenFiles
from data.subsets import share
from data.text import TextModule
from data.token_source import PartOfText, kept_lengths
from data.token_writer import write_tokens
from data.writers import write_image_shards
from moa_lightning.errors import UserError
from tests.data.conftest import write_pictures
from tests.data.test_resume import Recorder, fit
from tests.data.test_shards import write_tar
from tests.data.texts import message

COUNT = 150
FRACTIONS = (0.02, 0.1, 0.3, 0.75, 1.0)
KINDS = ("files", "shards", "tokens", "headless")
OPTIONS = {"context_length": 16, "batch_size": 2}


def document(number: int) -> bytes:
    """7 to 89 bytes without a NUL, whose beginning no other one has."""
    return (f"<{number:03d}>" + f"word{number} " * 12).encode()[: 7 + number * 37 % 83]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents as files, as two text shards, as token files, and as token files that do not know where
    documents begin."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "files").mkdir()
    for number in range(COUNT):
        (folder / "files" / f"{number:03d}.txt").write_bytes(document(number))
    for shard in range(2):
        numbers = range(COUNT // 2 * shard, COUNT // 2 * (shard + 1))
        write_tar(folder / f"text-{shard}.tar", [(f"{n}.txt", document(n)) for n in numbers])
    write_tar(folder / "val.tar", [(f"{n}.txt", document(n)) for n in range(20)])
    write_tokens([str(folder / "files")], str(folder / "tokens"), val_fraction=0.2)
    (folder / "headless").mkdir()
    for split in ("train", "val"):
        (folder / "headless" / f"{split}.bin").write_bytes((folder / "tokens" / f"{split}.bin").read_bytes())
    return folder


def module_of(corpus: Path, kind: str, fraction: float = 1.0, **options: Any) -> TextModule:
    values = {**OPTIONS, "seed": 0, "train_fraction": fraction, **options}
    module: TextModule
    if kind == "files":
        module = TextFiles(str(corpus / "files"), val_fraction=0.2, test_fraction=0.1, **values)
    elif kind == "shards":
        module = TextShards(str(corpus / "text-*.tar"), str(corpus / "val.tar"), **values)
    else:
        module = TokenFiles(str(corpus / kind), tokenizer="bytes", **values)
    module.setup("build")
    return module


def text(module: DataModule, split: str = "train") -> bytes:
    source = module.splits[split].source  # type: ignore[attr-defined]
    return bytes(source.read(0, len(source)).astype(np.uint8))


def parts(content: bytes) -> dict[bytes, bytes]:
    """Documents by their beginnings, of which each here is long enough but for a last one that is cut off early."""
    return {piece[:5]: piece for piece in content.replace(b"\0", b"").replace(b"<", b"\0<").split(b"\0") if piece}


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_is_exact_and_inside_every_larger_one(corpus: Path, kind: str) -> None:
    found = [text(module_of(corpus, kind, fraction)) for fraction in FRACTIONS]
    whole = found[-1]
    for fraction, content in zip(FRACTIONS, found, strict=True):
        assert len(content) == round(fraction * len(whole))
    for small, large in itertools.pairwise(found):
        if kind == "headless":
            assert large.startswith(small)
            continue
        more = parts(large)
        cut = [piece for begin, piece in parts(small).items() if more.get(begin) != piece]
        assert len(cut) <= 1  # the last one that stays
        assert all(any(piece.startswith(part) for piece in more.values()) for part in cut)
    if kind != "headless":
        spread = [int(begin[1:4]) for begin in parts(found[1]) if len(begin) == 5]
        assert min(spread) < COUNT / 3 < COUNT * 2 / 3 < max(spread)
        assert spread == sorted(spread) or kind == "tokens"


@pytest.mark.parametrize("kind", KINDS)
def test_neither_the_seed_nor_held_out_text_has_to_do_with_it(corpus: Path, kind: str) -> None:
    whole, part, other = (module_of(corpus, kind, *given) for given in ((1.0,), (0.3,), (0.3,)))
    other = module_of(corpus, kind, 0.3, seed=5)
    assert text(part) == text(other)
    for split in set(whole.splits) - {"train"}:
        assert text(part, split) == text(whole, split)
        assert part.splits[split].seed == whole.splits[split].seed
    facts = part.describe()
    how = "its beginning" if kind == "headless" else "documents by hash"
    assert facts["training_text"] == f"0.3 of it, {how}"
    assert facts[f"train_{'tokens' if kind in KINDS[2:] else 'bytes'}"] == len(text(part))
    assert "training_text" not in whole.describe()


def test_which_documents_stay_does_not_depend_on_how_many_are_held_out(corpus: Path) -> None:
    """The hash of the split would take those just above the validation set; this one is independent of it."""
    chosen = []
    for val in (0.1, 0.4):
        module = TextFiles(str(corpus / "files"), val_fraction=val, test_fraction=0.0, train_fraction=0.5, **OPTIONS)
        module.setup()
        chosen.append(set(parts(text(module))))
    assert len(chosen[1] - chosen[0]) < 0.2 * len(chosen[1])


BEFORE = {  # sha256 of an epoch's tokens and ids, and of the description, as the code had them before there was a share
    "files": "13540657f95be537",
    "shards": "b635db1643ab100f",
    "tokens": "93fe42fd7cd3721e",
    "headless": "be7a6df2b8554894",
}


def digest(module: DataModule, folder: Path) -> str:
    found = hashlib.sha256()
    for loader in (module.train_dataloader(), module.val_dataloader()):
        for batch in loader:
            found.update(batch["tokens"].numpy().tobytes() + batch["id"].numpy().tobytes())
    facts = {key: value for key, value in module.describe().items() if str(folder) not in str(value)}
    return hashlib.sha256(found.digest() + repr(sorted(facts.items())).encode()).hexdigest()[:16]


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_is_what_it_was_before(corpus: Path, kind: str) -> None:
    assert digest(module_of(corpus, kind), corpus) == BEFORE[kind]


def test_nothing_prepared_is_written_or_changed(corpus: Path) -> None:
    """Shares are taken on reading, so no file can be of another one."""
    for kind in KINDS:
        module_of(corpus, kind)
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    for kind in KINDS:
        module_of(corpus, kind, 0.3)
        module_of(corpus, kind)
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_a_part_reads_like_its_text_and_knows_its_documents(corpus: Path) -> None:
    for kind in KINDS[:3]:
        source = module_of(corpus, kind).splits["train"].source  # type: ignore[attr-defined]
        part = PartOfText(source, 0.4)
        whole = part.read(0, len(part))
        for start, stop in ((0, 1), (3, 90), (len(part) - 5, len(part)), (17, 17), (0, len(part))):
            assert part.read(start, stop).tolist() == whole[start:stop].tolist()
        starts = part.document_starts()
        assert starts.tolist() == [place for place, byte in enumerate(whole) if byte == ord("<")]
        assert len(part.begins) < len(starts)  # neighbours are read as one
        masked = module_of(corpus, kind, 0.4, mask_documents=True)
        assert masked.splits["train"].starts.tolist() == starts.tolist()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="mask_documents"):
        module_of(corpus, "headless", 0.4, mask_documents=True)


def test_documents_stay_in_the_order_of_their_hashes() -> None:
    lengths, hashes = np.array([5, 0, 7, 2]), np.array([3, 1, 0, 2], np.uint64)
    for wanted, kept in ((0, [0, 0, 0, 0]), (4, [0, 0, 4, 0]), (8, [0, 0, 7, 1]), (11, [2, 0, 7, 2]), (14, lengths)):
        assert kept_lengths(lengths, hashes, wanted).tolist() == list(kept)


def test_of_a_single_text_the_beginning_stays(tmp_path: Path) -> None:
    book = bytes(1 + n % 250 for n in range(2000))
    (tmp_path / "book.txt").write_bytes(book)
    module = TextFiles(str(tmp_path / "book.txt"), train_fraction=0.25, **OPTIONS)
    module.setup()
    assert text(module) == book[:450]  # a quarter of nine tenths
    assert text(module, "val") == book[1800:1900]
    write_tokens([str(tmp_path / "book.txt")], str(tmp_path / "out"))
    tokens = TokenFiles(str(tmp_path / "out"), train_fraction=0.25, **OPTIONS)
    tokens.setup()
    assert text(tokens) == book[:450]
    assert [m.describe()["training_text"] for m in (module, tokens)] == ["0.25 of it, its beginning"] * 2


def test_a_mixture_takes_the_share_of_each_source(corpus: Path) -> None:
    def mixture(fraction: float, own: float = 1.0, **options: Any) -> Mixture:
        sources = {
            "a": TokenFiles(str(corpus / "tokens"), train_fraction=own),
            "b": TextFiles(str(corpus / "files"), val_fraction=0.2),
        }
        module = Mixture(sources, train_fraction=fraction, **OPTIONS, **options)  # type: ignore[arg-type]
        module.setup()
        return module

    whole, part, smaller = mixture(1.0), mixture(0.5, weights={"a": 3.0, "b": 1.0}, epoch_samples=80), mixture(0.5, 0.2)
    for name, source in whole.sources.items():
        content = text(source)
        assert len(text(part.sources[name])) == round(0.5 * len(content))
        assert text(part.sources[name], "val") == text(source, "val")
    assert part.counts == {"a": 60, "b": 20}
    assert text(smaller.sources["a"]) == text(module_of(corpus, "tokens", 0.1))
    facts = smaller.describe()
    assert (facts["training_text"], facts["a_training_text"]) == ("0.5 of each source", "0.1 of it, documents by hash")


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_shares_that_are_none_are_refused(corpus: Path, fraction: float) -> None:
    for build in (TextFiles, Images, lambda **options: TokenFiles("anywhere", **options)):
        assert "give a share above 0" in message(lambda build=build: build(train_fraction=fraction))


def test_too_small_a_share_is_one_sentence(corpus: Path, tmp_path: Path) -> None:
    said = message(lambda: module_of(corpus, "files", 1e-6))
    assert "train_fraction 1e-06 leaves nothing of a training text of" in said
    said = message(lambda: module_of(corpus, "tokens", 0.002))
    assert "train_fraction 0.002 leaves" in said
    assert "context_length 16 needs at least 17: raise it" in said
    said = message(lambda: Mixture({"a": TextFiles(str(corpus / "files"))}, train_fraction=1e-6).setup())
    assert said.startswith("source 'a': train_fraction 1e-06")
    assert "leaves none of 3,500 training samples" in message(lambda: Images(train_fraction=1e-5).setup())
    said = message(lambda: Images(train_fraction=0.01).setup())
    assert "batch_size is 64 but the training data has only 35 samples" in said


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_run_goes_on_with_the_same_share(tmp_path: Path, stop: int) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(bytes(torch.randint(1, 256, (900,), generator=torch.Generator().manual_seed(0)).tolist()))

    def run(steps: int, resume: str | None = None) -> tuple[Any, Recorder]:
        return fit(str(book), tmp_path, steps, resume, train_fraction=0.3)

    whole = run(12)[1].seen
    assert max(number for batch in whole for number, _ in batch) < 24
    trainer, recorder = run(stop)
    trainer.save_checkpoint(str(tmp_path / "stopped.ckpt"))
    assert recorder.seen + run(12, str(tmp_path / "stopped.ckpt"))[1].seen == whole


def indices(module: DataModule) -> set[int]:
    return set(module.splits["train"].images.indices.tolist())  # type: ignore[attr-defined]


def test_images_stay_in_nested_shares_of_each_class_and_the_bank_stays_whole() -> None:
    built = []
    for fraction, seed in ((0.1, 0), (0.3, 3), (1.0, 0)):
        module = Images("mnist5k", batch_size=4, train_fraction=fraction, seed=seed)
        module.setup()
        built.append(module)
    small, large, whole = built
    assert torch.bincount(small.splits["train"].labels).tolist() == [35] * 10
    assert indices(small) < indices(large) < set(range(3500))
    for split in ("val", "test", "bank"):
        for module in (small, large):
            assert len(module.splits[split]) == len(whole.splits[split])
            assert torch.equal(module.splits[split][(0, 7)]["views"][0], whole.splits[split][(0, 7)]["views"][0])
            assert torch.equal(module.splits[split].labels, whole.splits[split].labels)
    assert small.describe()["training_images"] == "0.1 of all, subset seed 0"
    assert small.describe()["sha256"] == whole.describe()["sha256"]
    moved = Images("mnist5k", batch_size=4, train_fraction=0.1, subset_seed=1)
    moved.setup()
    assert len(indices(moved) & indices(small)) < 80
    rest = whole.splits["train"]
    assert (len(rest), rest.images.indices.tolist()) == (3500, sorted(rest.images.indices.tolist()))


def test_the_share_is_of_what_other_choices_leave() -> None:
    module = Images("mnist5k", batch_size=4, per_class=50, train_fraction=0.2)
    module.setup()
    assert torch.bincount(module.splits["train"].labels).tolist() == [10] * 10
    assert module.describe()["bank_samples"] == 500
    assert module.describe()["training_images"] == "0.2 of 50 of each class, subset seed 0"


def test_classes_share_as_evenly_as_whole_images_allow_and_the_total_is_exact() -> None:
    labels = torch.tensor([0] * 100 + [1] * 13 + [2] * 3 + [-1] * 40)[torch.randperm(156)]
    before: set[int] = set()
    for fraction in torch.arange(1, 101) / 100:
        chosen = share(labels, float(fraction), 4)
        assert len(chosen) == round(float(fraction) * 156)
        for label, size in Counter(labels.tolist()).items():
            off = abs(int((labels[chosen] == label).sum()) - float(fraction) * size)
            assert off <= (1 + 4 * size / 156) / 2 + 1e-4  # of four classes, as in mixtures
        assert before <= set(chosen.tolist())
        before = set(chosen.tolist())
    assert len(before) == 156


def test_shards_and_folders_of_images(tmp_path: Path, class_folder: Path) -> None:
    write_image_shards(str(class_folder), str(tmp_path / "shards"), samples_per_shard=5)
    train, val = (str(tmp_path / "shards" / f"{split}-*.tar") for split in ("train", "val"))
    write_pictures(tmp_path / "plain", 30)
    options = {"image_size": 16, "batch_size": 2}
    for build in (
        lambda **more: ImageShards(train, val, **options, **more),
        lambda **more: Images(str(class_folder), **options, **more),
        lambda **more: Images(str(tmp_path / "plain"), **options, **more),
    ):
        whole, half, most = (build(train_fraction=fraction) for fraction in (1.0, 0.5, 0.8))
        for module in (whole, half, most):
            module.setup()
        assert half.train_samples == round(0.5 * whole.train_samples)
        assert indices(half) < indices(most)
        counts = torch.bincount(half.splits["train"].labels + 1)
        assert abs(int(counts[1:].max()) - int(counts[1:].min())) <= 1 if len(counts) > 1 else True
        assert (half.val_samples, len(half.splits["bank"])) == (whole.val_samples, len(whole.splits["bank"]))
        assert len(list(half.train_dataloader())) == half.train_samples // 2


def test_rows_with_labels(tmp_path: Path) -> None:
    rows = [f'{{"text": "number {n}", "label": "{"ab"[n % 4 == 0]}"}}' for n in range(80)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    built = []
    for fraction in (0.25, 0.5, 1.0):
        paths = (str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl"))
        module = LabelledFiles(*paths, context_length=32, batch_size=2, train_fraction=fraction)
        module.setup()
        built.append(module)
    texts = [{row.texts for row in module.splits["train"].rows} for module in built]
    assert texts[0] < texts[1] < texts[2]
    assert torch.bincount(built[0].splits["train"].labels).tolist() == [15, 5]
    assert built[0].splits["val"].rows == built[2].splits["val"].rows
    assert len({module.describe()["sha256"] for module in built}) == 3
    assert (built[0].describe()["training_text"], built[0].num_classes) == ("0.25 of the rows", 2)


def test_each_domain_of_a_joint_run_has_its_own(corpus: Path) -> None:
    images = Images("mnist5k", batch_size=4, train_fraction=0.1)
    texts = TextFiles(str(corpus / "files"), val_fraction=0.2, train_fraction=0.5, **OPTIONS)
    module = Joint(images, texts)
    module.setup()
    assert len(module.splits["vision_train"]) == 350
    assert module.describe()["language_training_text"] == "0.5 of it, documents by hash"
