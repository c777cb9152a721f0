"""`moa data`: what is written is what the source gives, complete or absent."""

import json
import tarfile
import tracemalloc

import pytest
import torch
import webdataset

from data import Images, ImageShards, TextShards
from data.command import data_command
from data.documents import file_documents, split_documents, stdlib_documents
from data.sources import Bad
from data.text import SEPARATOR
from data.writers import write_image_shards, write_text_shards
from moa_lightning.errors import UserError


def rows(labelled):
    """Pixels and label of each image, sorted: a multiset that can be compared."""
    return sorted((labelled.images[i].numpy().tobytes(), int(labelled.labels[i])) for i in range(len(labelled.labels)))


def test_digits_survive_the_way_into_shards(tmp_path):
    out = tmp_path / "digits"
    shards = write_image_shards("mnist5k", str(out), samples_per_shard=1500)
    assert {split: len(paths) for split, paths in shards.items()} == {"train": 3, "val": 1, "test": 1}
    names = sorted(path.name for path in out.iterdir())
    assert names[:4] == ["class_names.json", "test-000000.tar", "train-000000.tar", "train-000001.tar"]
    split = {name: str(out / f"{name}-*.tar") for name in shards}
    module = ImageShards(**split, image_size=28, channels=1, mean=(0.1313,), std=(0.3086,))
    module.setup()
    originals, copies = Images().read(), module.read()
    for name in shards:
        assert rows(copies[name]) == rows(originals[name])
    assert torch.equal(copies["val"].labels, originals["val"].labels)  # held-out images keep their order
    labels = copies["train"].labels[:1500]
    assert torch.bincount(labels).min() > 90  # training images are shuffled: each shard holds all classes
    first = next(
        iter(webdataset.WebDataset(str(shards["train"][0]), shardshuffle=False, empty_check=False).decode("torchl8"))
    )
    assert torch.equal(torch.as_tensor(first["png"]).reshape(28, 28), copies["train"].images[0][0])


def test_text_survives_the_way_into_shards(tmp_path):
    shards = write_text_shards("stdlib", str(tmp_path / "text"), samples_per_shard=300)
    module = TextShards(str(tmp_path / "text/train-*.tar"), val=str(tmp_path / "text/val-*.tar"))
    module.setup()
    parts = split_documents(stdlib_documents(), 0.05, 0.05)
    source = module.splits["val"].source
    assert source.read(0, len(source)).tobytes() == SEPARATOR.join(document.content for document in parts["val"])
    theirs = webdataset.WebDataset([str(path) for path in shards["train"]], shardshuffle=False, empty_check=False)
    assert sorted(sample["txt"] for sample in theirs) == sorted(document.content for document in parts["train"])


def test_a_corpus_is_written_without_being_held(tmp_path):
    """Three documents of 24 MB each, in pieces; splits are those of TextFiles and of token files."""
    for number in range(3):
        with (tmp_path / f"{number}.txt").open("wb") as file:
            for line in range(24):
                file.write(b"%d %d " % (number, line) + b"word " * 200_000 + b"\n")
    tracemalloc.start()
    shards = write_text_shards(str(tmp_path / "*.txt"), str(tmp_path / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6
    parts = split_documents(file_documents(str(tmp_path / "*.txt")), 0.05, 0.05)
    for split, (path,) in shards.items():
        with tarfile.open(path) as tar:
            assert [tar.extractfile(member).read() for member in tar] == [part.content for part in parts[split]]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{split}-000000.tar" for split in sorted(parts)
    ]


def test_few_documents_are_split_by_position_and_json_lines_by_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": f"text {n}" * 20}) + "\n" for n in range(2)) + "[\n")
    bad = Bad("skip")
    shards = write_text_shards(str(tmp_path / "a.jsonl"), str(tmp_path / "out"), text_field="body", bad=bad)
    samples = {
        split: [sample["txt"].decode() for sample in webdataset.WebDataset(str(path), shardshuffle=False)]
        for split, (path,) in shards.items()
    }
    texts = [f"text {n}" * 20 for n in range(2)]
    assert sorted(samples["train"]) == [text[:108] for text in texts]
    assert samples["val"] == [text[108:114] for text in texts]
    assert samples["test"] == [text[-6:] for text in texts]
    assert bad.count == 1


def test_files_are_copied_as_they_are_unless_resized(class_folder, tmp_path):
    shards = write_image_shards(str(class_folder), str(tmp_path / "a"))
    originals = {path.read_bytes() for path in class_folder.rglob("*.*")}
    samples = list(
        webdataset.WebDataset([str(path) for paths in shards.values() for path in paths], shardshuffle=False)
    )
    assert {sample.get("jpg", sample.get("png")) for sample in samples} == originals
    assert len(samples) == 40
    write_image_shards(str(class_folder), str(tmp_path / "b"), image_size=12)
    small = ImageShards(str(tmp_path / "b/train-*.tar"), image_size=12, batch_size=4)
    small.setup()
    assert {tuple(small.read()["train"].images[i].shape) for i in range(10)} == {(3, 12, 12)}


def test_classes_keep_their_names(class_folder, tmp_path):
    write_image_shards(str(class_folder), str(tmp_path / "a"))
    split = {name: str(tmp_path / "a" / f"{name}-*.tar") for name in ("train", "val")}
    module = ImageShards(**split, image_size=12)
    module.read()
    assert module.class_names == ["cat", "dog"]
    names = tmp_path / "a" / "class_names.json"
    for content in ("{}", "[1, 2]", '["cat", "cat"]', "[", "[" * 100_000):
        names.write_text(content)
        with pytest.raises(UserError, match=r"class_names\.json is not a JSON list of different class names"):
            module.read()
    names.write_text('["cat"]')
    with pytest.raises(UserError, match=r"class_names\.json beside the shards names 1 classes, and class 1 is among"):
        module.read()
    names.unlink()
    module.read()
    assert module.class_names is None
    for folder, order in (("a", ["cat", "dog"]), ("b", ["dog", "cat"])):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "class_names.json").write_text(json.dumps(order))
    (tmp_path / "a" / "val-000000.tar").rename(tmp_path / "b" / "val-000000.tar")
    with pytest.raises(UserError, match=r"a/class_names\.json and .*b/class_names\.json name classes differently"):
        ImageShards(split["train"], val=str(tmp_path / "b/val-*.tar"), image_size=12).read()


def test_the_same_input_gives_the_same_bytes(class_folder, tmp_path):
    first, second = (write_image_shards(str(class_folder), str(tmp_path / name)) for name in "ab")
    for split, paths in first.items():
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in second[split]]


def test_a_failure_leaves_nothing_behind(class_folder, tmp_path):
    (class_folder / "dog" / "3.JPG").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3\.JPG"):
        write_image_shards(str(class_folder), str(tmp_path / "out" / "shards"), image_size=12)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_with_content_is_never_written_to(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        data_command(["text", "--source", "stdlib", "--out", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


def test_the_command_prints_what_it_wrote_and_how_to_use_it(class_folder, tmp_path, capsys):
    out = tmp_path / "50% off"
    out.mkdir()  # an empty folder may exist, and a percent sign is only a letter
    data_command(["images", "--source", str(class_folder), "--out", str(out), "--samples_per_shard", "10"])
    printed = capsys.readouterr().out
    shards = sorted(path.name for path in out.glob("train-*.tar"))
    assert len(shards) >= 2
    assert "train" in printed
    assert f"--data ImageShards --data.train '{out}/train-*.tar'" in printed.replace("\n", "")
    assert "--data.image_size 224 --data.channels 3" in printed
    assert out.stat().st_mode & 0o777 == tmp_path.joinpath("pictures").stat().st_mode & 0o777


def test_the_command_takes_several_texts(tmp_path, capsys):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    sources = [str(tmp_path / f"{name}.txt") for name in "abcdef"]
    data_command(["text", "--source", *sources, "--out", str(tmp_path / "out"), "--val_fraction", "0.2"])
    assert "--data TextShards" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.tar"))) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["images", "--source", "nowhere", "--out", "OUT"], "neither a folder"),
        (["text", "--source", "nowhere", "--out", "OUT"], "does not exist"),
        (["text", "--source", "stdlib", "--out", "OUT", "--samples_per_shard", "0"], "samples_per_shard is 0"),
        (["text", "--source", "stdlib", "--out", "OUT", "--val_fraction", "2"], "sum must stay below 1"),
    ],
)
def test_mistakes_are_named(tmp_path, argv, message):
    argv = [str(tmp_path / "out") if word == "OUT" else word for word in argv]
    with pytest.raises(UserError, match=message):
        data_command(argv)
    assert not (tmp_path / "out").exists()


def test_without_arguments_it_tells_what_it_wants():
    with pytest.raises(UserError, match=r"moa data: .*required: kind; moa data --help lists"):
        data_command([])
