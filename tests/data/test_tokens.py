"""Token files: what is read back is what was written; mistakes are one sentence."""

import re
import tarfile

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import data.documents
from data import TextFiles, TokenFiles
from data.command import data_command
from data.documents import split_documents, stdlib_documents
from data.token_files import HEADER_BYTES, find_tokens
from data.token_writer import write_tokens
from data.tokenizer import open_tokenizer
from data.writers import write_text_shards
from tests.data.texts import lines, message, module_of, stream


def test_token_files_hold_every_document_once(bpe, tmp_path):
    texts = lines(tmp_path)
    written = write_tokens([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), bpe, 0.2, 0.2)
    module = module_of(tmp_path / "out")
    found = []
    for split, part in written.description["splits"].items():
        tokens = stream(module, split)
        assert len(tokens) == part["tokens"]
        starts = np.fromfile(tmp_path / "out" / part["starts"], "<i8")
        assert len(starts) == part["documents"]
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            assert tokens[stop - 1] == module.tokenizer.separator
            found.append(module.decode(tokens[start : stop - 1].tolist()))
    assert sorted(found) == sorted(texts)
    assert sum(part["bytes"] for part in written.description["splits"].values()) == sum(len(t.encode()) for t in texts)
    again = write_tokens([str(tmp_path / "a.jsonl")], str(tmp_path / "again"), bpe, 0.2, 0.2)
    assert again.description == written.description


def test_a_document_keeps_its_split_when_others_come_and_go(tmp_path):
    lines(tmp_path)
    sets = []
    for name, keep in (("all", 60), ("half", 30)):
        part = (tmp_path / "a.jsonl").read_text().splitlines()[60 - keep :]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part))
        write_tokens([str(tmp_path / f"{name}.jsonl")], str(tmp_path / name), "bytes", 0.3, 0.0)
        sets.append(set(bytes(stream(module_of(tmp_path / name), "val").astype(np.uint8)).split(b"\0")))
    assert len(sets[0]) > len(sets[1]) > 3
    assert sets[1] <= sets[0]


def test_a_single_text_is_split_by_position(tmp_path):
    (tmp_path / "a.txt").write_bytes(bytes(range(1, 251)) * 20)
    write_tokens([str(tmp_path / "a.txt")], str(tmp_path / "out"))
    module = module_of(tmp_path / "out")
    whole = np.concatenate([stream(module, split) for split in ("train", "val", "test")])
    assert bytes(whole.astype(np.uint8)) == bytes(range(1, 251)) * 20 + b"\0"
    assert [len(module.splits[split].source) for split in ("train", "val", "test")] == [4501, 250, 250]


def halves(split) -> set[bytes]:
    """The documents of a split of texts that are joined by NUL."""
    return {text for text in bytes(np.asarray(split).astype(np.uint8)).split(b"\0") if text}


@pytest.mark.parametrize("count", [3, 12, 40])
@pytest.mark.parametrize("start", range(5))
def test_few_documents_are_split_alike_however_they_are_read(tmp_path, count, start):
    """A split that the hash leaves empty takes the next document, in token files as in texts and shards."""
    (tmp_path / "texts").mkdir()
    for number in range(count):
        (tmp_path / f"texts/{number}.txt").write_text(f"text {start} {number} " * 30)
    write_tokens([str(tmp_path / "texts")], str(tmp_path / "out"))
    write_text_shards(str(tmp_path / "texts"), str(tmp_path / "shards"))
    tokens = module_of(tmp_path / "out")
    texts = TextFiles(str(tmp_path / "texts"), context_length=16, batch_size=4)
    texts.setup()
    for split in ("train", "val", "test"):
        documents = halves(texts.splits[split].source.content)
        assert halves(stream(tokens, split)) == documents
        with tarfile.open(tmp_path / f"shards/{split}-000000.tar") as tar:
            assert {tar.extractfile(member).read() for member in tar} == documents
        assert len(documents) >= 1


def test_the_standard_library_goes_by_name_in_token_files_too(tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    for number in range(60):
        (tmp_path / f"library/module{number}.py").write_text("pass\n" * 9)  # the same beginning
    monkeypatch.setattr(data.documents, "_library", lambda: tmp_path / "library")
    written = write_tokens(["stdlib"], str(tmp_path / "out"), "bytes", 0.2, 0.2)
    parts = split_documents(stdlib_documents(), 0.2, 0.2)
    assert {split: part["documents"] for split, part in written.description["splits"].items()} == {
        split: len(part) for split, part in parts.items()
    }
    assert all(len(part) > 3 for part in parts.values())


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_files_of_nanogpt_and_llm_c(bpe, tmp_path, magic, version, dtype):
    tokens = np.arange(300) % 400
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens)
    for n in range(2):
        (tmp_path / f"x_train_{n:06d}.bin").write_bytes(header.tobytes() + ((tokens + n) % 400).astype(dtype).tobytes())
    (tmp_path / "x_val_000000.bin").write_bytes(tokens.astype("<u2").tobytes())
    module = module_of(tmp_path, tokenizer=bpe)
    assert stream(module, "train").tolist() == [*tokens, *((tokens + 1) % 400)]
    assert stream(module, "val").tolist() == tokens.tolist()
    (tmp_path / "pretrain_val.bin").write_bytes(tokens.astype("<u2").tobytes())
    assert "pretrain_val.bin' has the names of two splits" in message(lambda: module_of(tmp_path, tokenizer=bpe))
    across = module.splits["train"].source.read(290, 310)
    assert across.tolist() == stream(module, "train")[290:310].tolist()
    assert find_tokens(str(tmp_path / "x_train_000000.bin"), np.dtype("<u2")).offset == HEADER_BYTES


def test_windows_of_byte_token_files_are_those_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("some words, again and again; " * 60)
    write_tokens([str(tmp_path / "a.txt")], str(tmp_path / "out"))
    ours = TokenFiles(str(tmp_path / "out"), context_length=16, batch_size=4, seed=3, shuffle_block=0)
    ours.setup()
    theirs = TextFiles(str(tmp_path / "a.txt"), context_length=16, batch_size=4, seed=3)
    theirs.setup()
    for mine, other in zip(ours.train_dataloader(), theirs.train_dataloader(), strict=True):
        assert torch.equal(mine["tokens"], other["tokens"])


def test_bad_tokenizers_and_token_files_are_named(bpe, tmp_path):
    lines(tmp_path)
    folder = tmp_path / "out"
    write_tokens([str(tmp_path / "a.jsonl")], str(folder), bpe)
    (tmp_path / "none.json").write_text('{"a": 1}')
    assert "is not a tokenizer.json" in message(lambda: module_of(folder, tokenizer=str(tmp_path / "none.json")))
    assert "cannot be read" in message(lambda: module_of(folder, tokenizer=str(tmp_path / "absent.json")))
    assert "were not written with the tokenizer 'bytes'" in message(lambda: module_of(folder, tokenizer="bytes"))
    lossy = Tokenizer(models.WordLevel({"a": 0, "[SEP]": 1}, unk_token="a"))
    lossy.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy.save(str(tmp_path / "lossy.json"))
    assert "which bytes its tokens stand for" in message(lambda: open_tokenizer(str(tmp_path / "lossy.json")))

    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-10])
    assert re.search(r"train.bin' holds .* tokens, where [\d,]+ were expected", message(lambda: module_of(folder)))
    high = np.frombuffer(content, "<u2").copy()
    high[50] = 400
    (folder / "train.bin").write_bytes(high.tobytes())
    module = module_of(folder)
    said = message(lambda: list(module.train_dataloader()))
    assert "has the token 400 at place 50, but the vocabulary ends at 399" in said
    skipping = module_of(folder, on_bad_sample="skip")
    batches = list(skipping.train_dataloader())
    assert sum(len(batch.get("faults", [])) for batch in batches) == 1
    (folder / "train.bin").write_bytes(content[:-10])  # during a run
    assert "was changed or cut off" in message(lambda: stream(module, "train"))

    (folder / "tokens.json").write_text('{"splits": 3}')
    assert "does not describe token files" in message(lambda: module_of(folder))
    (folder / "tokens.json").unlink()
    (folder / "tokenizer.json").unlink()
    assert "have no tokenizer.json beside them" in message(lambda: module_of(folder))
    assert "do not exist" in message(lambda: module_of(tmp_path / "absent"))


def test_the_commands(tmp_path, capsys):
    lines(tmp_path)
    source, folder = str(tmp_path / "a.jsonl"), tmp_path / "out"
    data_command(["tokenizer", "--source", source, "--vocab_size", "300", "--out", str(tmp_path / "t.json")])
    data_command(["tokens", "--source", source, "--tokenizer", str(tmp_path / "t.json"), "--out", str(folder)])
    assert f"--data TokenFiles --data.source '{folder}'" in capsys.readouterr().out
    assert module_of(folder).vocab_size == 300
    for size, told in (("200", "must lie between 257"), ("90000", "pieces for")):
        options = ["tokenizer", "--source", source, "--vocab_size", size, "--out", str(tmp_path / "u.json")]
        assert told in message(lambda options=options: data_command(options))
    assert not (tmp_path / "u.json").exists()
