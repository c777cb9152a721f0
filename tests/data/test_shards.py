"""Shards: the index against the package webdataset, both data modules, and every bad shard."""

import io
import json
import os
import tarfile

import pytest
import torch
import webdataset
from torchvision.io import encode_png

from data import ImageShards, TextShards
from data.shards import ShardIndex, ShardMembers, expand
from moa_lightning.errors import UserError
from tests.data.conftest import picture


def write_tar(path, members, tar_format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def png(number, size=20):
    return encode_png(picture(number, size, size)).numpy().tobytes()


@pytest.fixture
def image_shards(tmp_path):
    """Three shards of 10 images, classes 0 to 4."""
    for shard in range(3):
        numbers = range(10 * shard, 10 * shard + 10)
        members = [
            (f"{n:04d}.{end}", c) for n in numbers for end, c in (("cls", f"{n % 5}\n".encode()), ("png", png(n)))
        ]
        write_tar(tmp_path / f"part-{shard:03d}.tar", members)
    return str(tmp_path / "part-{000..002}.tar")


@pytest.fixture
def text_shards(tmp_path):
    texts = [bytes([65 + n]) * (7 * n) for n in range(20)]  # the first one is empty
    for shard in range(2):
        members = [(f"{n}.txt", texts[n]) for n in range(10 * shard, 10 * shard + 10)]
        write_tar(tmp_path / f"text-{shard}.tar", members)
    return str(tmp_path / "text-*.tar"), b"\0".join(texts)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_agrees_with_webdataset(tmp_path, tar_format):
    long = "folder/" * 12 if tar_format == tarfile.USTAR_FORMAT else "a long folder name/" * 12
    members = [
        ("__meta__", b"ignored"),
        ("no extension", b"ignored"),
        ("a.b.png", b"one"),  # everything after the first dot is the extension
        ("a.CLS", b"3"),
        (f"{long}x.png", b"twelve"),
        (f"{long}x.json", b"{}"),
        ("dir.with.dots/y.png", b""),
        ("b.png", b"four"),
    ]
    path = write_tar(tmp_path / "s.tar", members, tar_format)
    theirs = list(webdataset.WebDataset(path, shardshuffle=False, empty_check=False))
    index = ShardIndex(path)
    content = (tmp_path / "s.tar").read_bytes()
    ours = [
        {"__key__": key, **{end: content[offset : offset + length] for end, (offset, length) in spans.items()}}
        for key, spans, _ in index.records
    ]
    assert ours == [
        {name: v for name, v in sample.items() if name not in ("__url__", "__local_path__")} for sample in theirs
    ]
    assert [record.label for record in index.records] == [3, -1, -1, -1]


def test_the_index_is_kept_and_checked_against_the_shard(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"first")])
    ShardIndex(path)
    stored = tmp_path / "s.tar.index.json"
    assert json.loads(stored.read_text())["samples"]
    monkeypatch.setattr("data.shards.scan", lambda path: pytest.fail("scanned again"))
    assert ShardIndex(path).records == [("a", {"txt": (512, 5)}, -1)]
    monkeypatch.undo()
    write_tar(tmp_path / "s.tar", [("b.txt", b"again"), ("c.txt", b"more")])
    os.utime(path, ns=(1, 1))
    assert [record.key for record in ShardIndex(path).records] == ["b", "c"]
    stored.write_text("{broken")
    assert len(ShardIndex(path)) == 2


def test_where_the_shards_are_read_only_the_index_goes_to_the_cache(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"first")])
    (tmp_path / "s.tar.index.json").mkdir()  # nothing can be written there, even by root
    ShardIndex(path)
    monkeypatch.setattr("data.shards.scan", lambda path: pytest.fail("scanned again"))
    assert len(ShardIndex(path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar", "s.tar.index.json"]  # no temporary file is left


def test_expansion_of_ranges_lists_and_globs(tmp_path):
    for number in range(12):
        write_tar(tmp_path / f"s-{number:02d}.tar", [("a.txt", b"x")])
    everything = [str(tmp_path / f"s-{number:02d}.tar") for number in range(12)]
    assert expand(str(tmp_path / "s-{00..11}.tar")) == everything
    assert expand(str(tmp_path / "s-*.tar")) == everything
    assert expand([everything[3], str(tmp_path / "s-{01,05}.tar")]) == [everything[n] for n in (3, 1, 5)]


def test_images_come_out_as_webdataset_reads_them(image_shards):
    module = ImageShards(image_shards, val=image_shards, image_size=20, batch_size=4)
    module.setup()
    theirs = list(webdataset.WebDataset(image_shards, shardshuffle=False, empty_check=False).decode("torchrgb8"))
    images = module.read()["train"]
    assert len(theirs) == len(images.labels) == 30
    for i, sample in enumerate(theirs):
        assert torch.equal(images.images[i], torch.as_tensor(sample["png"]))
        assert images.labels[i] == sample["cls"]
    assert module.num_classes == 5
    assert module.describe()["shards"] == 6


def test_shards_feed_the_same_batches_as_every_other_source(image_shards, as_rank):
    def batches(**options):
        module = ImageShards(image_shards, val=image_shards, image_size=16, batch_size=6, shuffle_block=4, **options)
        return module

    whole = as_rank(batches())
    whole.setup()
    expected = list(whole.train_dataloader())
    assert [batch["views"][0].shape for batch in expected] == [(6, 3, 16, 16)] * 5
    assert sorted(torch.cat([batch["id"] for batch in expected]).tolist()) == list(range(30))
    for rank in (0, 1):
        module = as_rank(batches(num_workers=3), rank, 2)  # more readers than shards
        module.setup()
        for mine, batch in zip(module.train_dataloader(), expected, strict=True):
            assert torch.equal(mine["views"][0], batch["views"][0][3 * rank : 3 * rank + 3])
    bank, query = whole.val_dataloader()
    assert sum(len(batch["id"]) for batch in query) == sum(len(batch["id"]) for batch in bank) == 30
    assert sum(len(batch["id"]) for batch in whole.test_dataloader()[1]) == 30  # without test shards, those of val


@pytest.mark.parametrize(
    ("labels", "block", "warned"),
    [
        ("ordered", 4, True),
        ("ordered", 0, False),  # shuffled freely
        ("ordered", 25, False),  # 16 blocks are more than there are
        ("shuffled", 4, False),
        ("one class", 4, False),
        ("unlabelled", 4, False),
    ],
)
def test_shards_in_class_order_are_warned_of(tmp_path, caplog, labels, block, warned):
    """20 classes of 10 images; a batch from 16 blocks of 4 neighbours in class order has few of them."""
    numbers = {
        "ordered": range(200),
        "shuffled": torch.randperm(200, generator=torch.Generator().manual_seed(0)).tolist(),
    }
    members, image = [], png(0, 8)
    for place, n in enumerate(numbers.get(labels, [0] * 200)):
        members += [] if labels == "unlabelled" else [(f"{place:03d}.cls", f"{n // 10}".encode())]
        members.append((f"{place:03d}.png", image))
    module = ImageShards(
        write_tar(tmp_path / "s.tar", members), image_size=8, batch_size=64, shuffle_block=block, bank_size=8
    )
    module.setup("test")
    assert not caplog.records
    module.setup("fit")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    assert all("class order" in text and "data.shuffle_block to 0" in text for text in said)


def test_text_shards_are_one_string_joined_by_nul(text_shards):
    pattern, joined = text_shards
    module = TextShards(pattern, val=pattern, context_length=16, batch_size=4)
    module.setup()
    source = module.splits["train"].source
    assert len(source) == len(joined)
    for start in range(0, len(joined), 13):
        for stop in (start, start + 1, start + 17, start + 300, len(joined)):
            stop = min(stop, len(joined))
            assert source.read(start, stop).tobytes() == joined[start:stop]
    targets = torch.cat([batch["targets"].flatten() for batch in module.val_dataloader()])
    assert bytes(targets[targets >= 0].tolist()) == joined[1:]
    batch = next(iter(module.train_dataloader()))
    assert batch["tokens"].shape == (4, 16)


def test_text_of_a_single_empty_document_is_too_short(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"")])
    with pytest.raises(UserError, match="0 bytes"):
        TextShards(path).setup()


def bad_not_tar(path):
    path.write_bytes(b"this is a letter, not an archive\n" * 100)


def bad_gzip(path):
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("a.png")
        tar.addfile(info, io.BytesIO())


def bad_zero(path):
    path.touch()


def bad_no_samples(path):
    write_tar(path, [])


def bad_pickled(path):
    write_tar(path, [("a.png", png(0)), ("a.extra.pkl", b"cos\nsystem\n")])


def bad_no_image(path):
    write_tar(path, [("a.png", png(0)), ("b.cls", b"1")])


def bad_label(path):
    write_tar(path, [("a.png", png(0)), ("a.cls", b"seven")])


def bad_twice(path):
    write_tar(path, [("a.png", png(0)), ("a.png", png(0))])


def bad_cut(path):
    write_tar(path, [("a.png", png(0)), ("b.png", png(1))])
    path.write_bytes(path.read_bytes()[:1000])


def bad_cut_at_the_end(path):
    write_tar(path, [("a.png", png(0)), ("b.png", png(1))])
    last = ShardIndex(str(path)).records[1].members["png"]
    path.write_bytes(path.read_bytes()[: sum(last) - 100])


def bad_picture(path):
    write_tar(path, [("first.png", b"no picture")])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_not_tar, "not an uncompressed tar"),
        (bad_gzip, "not an uncompressed tar"),
        (bad_zero, "not an uncompressed tar"),
        (bad_no_samples, "holds no samples"),
        (bad_pickled, "pickled member 'a.extra.pkl'"),
        (bad_no_image, r"sample 'b' .* has no member jpg, .* \(it has cls\)"),
        (bad_label, "b'seven' in 'a.cls'"),
        (bad_twice, "two members 'a.png'"),
        (bad_cut, "unexpected end"),
        (bad_cut_at_the_end, "unexpected end"),
        (bad_picture, "sample 'first' of shard .* cannot be decoded"),
    ],
)
def test_bad_shards_are_named(tmp_path, damage, message):
    good = write_tar(tmp_path / "good.tar", [("a.png", png(0)), ("b.png", png(1))])
    damage(tmp_path / "bad.tar")
    with pytest.raises(UserError, match=message) as caught:
        ImageShards(good, val=str(tmp_path / "bad.tar"), batch_size=1).setup()
    assert "bad.tar" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing.tar", "nothing.tar' does not exist"),
        ("part-{000..003}.tar", "part-003.tar' does not exist"),
        ("none-*.tar", r"none-\*.tar' does not exist"),
        ("pipe:cat part-000.tar", "command or an address"),
        ("https://example.org/a.tar", "command or an address"),
        ([], "no shards"),
    ],
)
def test_missing_and_foreign_shards_are_named(image_shards, tmp_path, monkeypatch, pattern, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        expand(pattern)


def test_text_shards_name_a_sample_without_text(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.json", b"{}")])
    with pytest.raises(UserError, match=r"sample 'a' of shard .*s.tar has no member txt"):
        TextShards(path).setup()


def test_members_are_read_in_pieces(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.txt", b"hello world")])
    members = ShardMembers([path], ("txt",))
    assert members.read(0) == b"hello world"
    assert members.read(0, 6, 9) == b"wor"
