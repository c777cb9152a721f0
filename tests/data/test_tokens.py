"""Tokenizers, document sources, token files: what is read back is what was written; mistakes are one sentence."""

import gzip
import json
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from data import TextFiles, TokenFiles
from data.command import data_command
from data.documents import PIECE, cut_place
from data.sources import Bad, documents
from data.token_files import HEADER_BYTES, find_tokens
from data.token_writer import train_tokenizer, write_tokens
from data.tokenizer import END_OF_TEXT, open_tokenizer, train_bpe
from moa_lightning.errors import UserError
from tests.data.test_shards import write_tar

TEXT = "Ein Text über Äpfel: naïve café, 日本語 und 🙂.\n  def f(x):\n\treturn x ** 2\n"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.txt").write_text(TEXT * 50 + "".join(f"word{n} " for n in range(300)))
    path = folder / "tokenizer.json"
    train_tokenizer([str(folder / "a.txt")], str(path), 400)
    return str(path)


def lines(folder: Path, count: int = 60, name: str = "a.jsonl") -> list[str]:
    texts = [f"{TEXT}number {n} " * (n % 7 + 1) for n in range(count)]
    (folder / name).write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return texts


def module_of(folder, **options) -> TokenFiles:
    module = TokenFiles(str(folder), context_length=16, batch_size=4, seed=0, **options)
    module.setup()
    return module


def stream(module: TokenFiles, split: str) -> np.ndarray:
    source = module.splits[split].source
    return source.read(0, len(source))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_tokenizer_gives_back_the_text_and_its_bytes(bpe, tmp_path, kind):
    lines(tmp_path)
    name = bpe if kind == "bpe" else "bytes"
    write_tokens([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), name)
    module = module_of(tmp_path / "out")
    for text in (TEXT, "", "\n", f"a {END_OF_TEXT} b"):
        tokens = module.encode(text)
        assert module.decode(tokens) == text
        assert module.token_bytes[tokens].sum() == len(text.encode())
    assert module.vocab_size == len(module.token_bytes) == (400 if kind == "bpe" else 256)
    if kind == "bpe":
        assert module.tokenizer.pieces[module.tokenizer.separator] == b""
        assert module.tokenizer.separator not in module.encode(END_OF_TEXT)  # a name in a text is text
        library = Tokenizer.from_file(bpe)
        assert module.encode(TEXT) == library.encode(TEXT).ids
        assert len(module.encode(TEXT)) < len(TEXT.encode()) / 2


def test_a_tokenizer_is_read_once_and_anew_where_its_file_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One relative name in two folders, and a file that is written again."""
    for folder, size in (("a", 258), ("b", 259)):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        train_bpe(["ab ab ab abc abc abc"], size).save("t.json")
        assert len(open_tokenizer("t.json").pieces) == size
    assert open_tokenizer("t.json") is open_tokenizer("t.json")
    train_bpe(["ab ab ab abc abc abc"], 258).save("t.json")
    assert len(open_tokenizer("t.json").pieces) == 258


def test_a_tokenizer_of_sentence_pieces_kind(tmp_path):
    vocabulary = {"<s>": 0, "</s>": 1, "\u2581": 2, "a": 3, "\u2581a": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    library = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer(str(tmp_path / "t.json"))
    (tokens,) = tokenizer.encode([" a aé\n".encode()])
    assert b"".join(tokenizer.pieces[token] for token in tokens) == " a aé\n".encode()
    assert tokens[0] == 4
    assert tokenizer.separator == 1
    assert tokenizer.pieces[1] == b""


def sentence_pieces(folder: Path, name: str, **parts) -> str:
    """A tokenizer.json of Llama 2's kind with other parts."""
    vocabulary = {"</s>": 0, "\u2581": 1, "a": 2, "\u2581a": 3} | {f"<0x{b:02X}>": 4 + b for b in range(256)}
    library = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], byte_fallback=True))
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for part, value in parts.items():
        setattr(library, part, value)
    library.add_special_tokens(["</s>"])
    library.save(str(folder / name))
    return str(folder / name)


def as_spaces(*first):
    return normalizers.Sequence([*first, normalizers.Replace(" ", "\u2581")])


def test_no_tokenizer_puts_a_space_before_a_text(bpe, tmp_path):
    """As Llama 2's file does, one of Metaspace, and old ones of bytes: a document would have one byte more."""
    library = Tokenizer.from_file(bpe)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.save(str(tmp_path / "bytes.json"))
    assert len(library.encode("a").ids) == 2
    paths = [
        str(tmp_path / "bytes.json"),
        sentence_pieces(tmp_path, "prepend.json", normalizer=as_spaces(normalizers.Prepend("\u2581"))),
        sentence_pieces(tmp_path, "meta.json", pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    ]
    for path in paths:
        tokenizer = open_tokenizer(path)
        exported = Tokenizer.from_str(json.dumps(tokenizer.as_json()))
        for text in ("a", " a aé", "", "  "):
            (tokens,) = tokenizer.encode([text.encode()])
            assert b"".join(tokenizer.pieces[token] for token in tokens) == text.encode(), path
            assert exported.encode(text).ids == tokens.tolist()
            assert exported.decode(tokens.tolist()) == text


def test_unicode_in_its_usual_spelling_passes(bpe, tmp_path):
    library = Tokenizer.from_file(bpe)
    library.normalizer = normalizers.NFC()
    library.save(str(tmp_path / "nfc.json"))
    tokenizer = open_tokenizer(str(tmp_path / "nfc.json"))
    (tokens,) = tokenizer.encode(["e\u0301 e".encode()])
    assert b"".join(tokenizer.pieces[token] for token in tokens).decode() == "\u00e9 e"


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"normalizer": as_spaces(normalizers.Lowercase())}, "Lowercase"),
        ({"normalizer": as_spaces(normalizers.StripAccents())}, "StripAccents"),
        ({"normalizer": as_spaces(normalizers.NFKC())}, "NFKC"),
        ({"normalizer": normalizers.Replace("a", "\u2581")}, "Replace"),
        ({"normalizer": as_spaces(), "pre_tokenizer": pre_tokenizers.WhitespaceSplit()}, "WhitespaceSplit"),
        ({"normalizer": as_spaces(), "pre_tokenizer": pre_tokenizers.Split("a", "removed")}, "Split"),
    ],
)
def test_tokenizers_that_change_text_are_refused(tmp_path, parts, told):
    assert f"changes text ({told})" in message(lambda: open_tokenizer(sentence_pieces(tmp_path, "t.json", **parts)))


def test_the_token_between_documents_counts_alike(bpe, tmp_path):
    texts = lines(tmp_path)
    for name in ("bytes", bpe):
        folder = tmp_path / Path(name).stem
        write_tokens([str(tmp_path / "a.jsonl")], str(folder), name, 0.0, 0.0)
        module = module_of(folder)
        assert module.token_bytes[stream(module, "train")].sum() == sum(len(text.encode()) + 1 for text in texts)


def test_training_a_tokenizer_is_deterministic(bpe, tmp_path):
    (tmp_path / "a.txt").write_bytes((Path(bpe).parent / "a.txt").read_bytes())
    train_tokenizer([str(tmp_path / "a.txt")], str(tmp_path / "t.json"), 400)
    assert (tmp_path / "t.json").read_bytes() == Path(bpe).read_bytes()


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


def test_all_kinds_of_sources_give_the_same_documents(tmp_path):
    texts = lines(tmp_path, 5)
    content = (tmp_path / "a.jsonl").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(content))
    (tmp_path / "blob").write_bytes(content)
    (tmp_path / "snapshot.json").symlink_to(tmp_path / "blob")  # as Hugging Face's cache has its files
    write_tar(tmp_path / "c.tar", [(f"{n}.txt", text.encode()) for n, text in enumerate(texts)])
    (tmp_path / "d").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "d" / f"{n}.txt").write_text(text)
    (tmp_path / "e").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "e" / f"{n}.txt.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "b.jsonl.gz", "c4.json.gz", "snapshot.json", "c.tar", "d", "e"):
        found = [b"".join(text.pieces).decode() for text in documents([str(tmp_path / name)], "text", True, Bad())]
        assert found == texts, name


@pytest.mark.parametrize("needs_text", [True, False])
def test_packed_files_are_never_taken_for_plain_text(tmp_path, needs_text):
    """Compressed bytes are valid input of a tokenizer of bytes."""
    packed = gzip.compress(TEXT.encode() * 300)
    files = {
        "a.tar.gz": (packed, "is compressed, and only .txt"),
        "b.txt": (packed, "holds gzip and no plain text"),
        "c": (b"\x28\xb5\x2f\xfd" + b"x" * 40, "holds zstd and no plain text"),
        "d.txt": (b"PAR1" + b"x" * 40, "holds Parquet and no plain text"),
        "e.txt.gz": (packed[:-9], "cannot be read"),
    }
    for name, (content, told) in files.items():
        (tmp_path / name).write_bytes(content)
        assert told in message(lambda name=name: list(documents([str(tmp_path / name)], "text", needs_text, Bad())))
    bad = Bad("skip")
    assert not list(documents([str(tmp_path)], "text", needs_text, bad))
    assert bad.count == len(files)
    for name in ("b.txt", "c", "d.txt"):
        assert "and no plain text: unpack it" in message(TextFiles(str(tmp_path / name), context_length=8).setup)
    for name in ("e.jsonl", "f.NDJSON"):
        (tmp_path / name).write_text(json.dumps({"text": TEXT}))
        told = message(TextFiles(str(tmp_path / name), context_length=8).setup)
        assert "holds a JSON object a line and no plain text: rename it" in told


def test_zst_and_parquet_where_their_packages_are(tmp_path, monkeypatch):
    texts = lines(tmp_path, 5)
    for name, path in (("zstandard", tmp_path / "b.jsonl.zst"), ("pyarrow", tmp_path / "c.parquet")):
        path.write_bytes(b"nothing")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=f"needs the package {name}"):
                list(documents([str(path)], "text", True, Bad()))
    import pyarrow as arrow
    import zstandard
    from pyarrow import parquet

    content = (tmp_path / "a.jsonl").read_bytes()
    frames = [zstandard.compress(content[:50]), zstandard.compress(content[50:])]  # as parallel compressors write them
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(frames))
    parquet.write_table(arrow.table({"body": texts}), tmp_path / "blob")
    (tmp_path / "c.parquet").unlink()
    (tmp_path / "c.parquet").symlink_to(tmp_path / "blob")
    for name, field in (("b.jsonl.zst", "text"), ("c.parquet", "body")):
        found = [b"".join(text.pieces).decode() for text in documents([str(tmp_path / name)], field, True, Bad())]
        assert found == texts
    with pytest.raises(UserError, match="no column 'text'"):
        list(documents([str(tmp_path / "c.parquet")], "text", True, Bad()))


def test_a_large_row_group_is_not_held_whole(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    texts = arrow.array([os.urandom(4000).hex() for _ in range(6000)])  # 48 MB that do not compress
    parquet.write_table(arrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=6000, use_dictionary=False)
    del texts
    before, pool = arrow.default_memory_pool(), arrow.proxy_memory_pool(arrow.default_memory_pool())
    arrow.set_memory_pool(pool)
    try:
        found = documents([str(tmp_path / "a.parquet")], "text", True, Bad())
        assert sum(len(piece) for text in found for piece in text.pieces) == 48_000_000
    finally:
        arrow.set_memory_pool(before)
    assert 0 < pool.max_memory() < 30_000_000


def test_a_cut_lies_between_two_words_on_two_lines():
    assert cut_place(b"x" * 20 + b"\nab\n\ncd \nef\n gh") == 21


def test_a_long_text_comes_in_pieces_that_change_no_token(bpe, tmp_path):
    text = "".join(f"{TEXT}\n\n{n} line\r\nabc\n" for n in range(9000))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (found,) = [list(t.pieces) for t in documents([str(tmp_path / "a.txt")], "text", True, Bad())]
    assert len(found) > 3
    assert max(map(len, found)) <= PIECE
    assert b"".join(found) == text.encode()
    tokenizer = open_tokenizer(bpe)
    whole = tokenizer.encode([text.encode()])[0].tolist()
    assert [token for part in tokenizer.encode(found) for token in part.tolist()] == whole
    (tmp_path / "a.txt").write_bytes("é".encode() * PIECE)  # nowhere a line to cut after
    (found,) = [list(t.pieces) for t in documents([str(tmp_path / "a.txt")], "text", True, Bad())]
    assert "".join(piece.decode() for piece in found) == "é" * PIECE


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


def nanogpt_folder(folder: Path, text: str) -> dict[str, int]:
    """What nanoGPT's data/shakespeare_char/prepare.py writes: ids of the sorted characters as uint16, and its table."""
    folder.mkdir(exist_ok=True)
    ids = {character: number for number, character in enumerate(sorted(set(text)))}
    for split, part in (("train", text[: len(text) * 9 // 10]), ("val", text[len(text) * 9 // 10 :])):
        (folder / f"{split}.bin").write_bytes(np.array([ids[character] for character in part], "<u2").tobytes())
    table = {"vocab_size": len(ids), "itos": {number: text for text, number in ids.items()}, "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(table))
    return ids


def test_nanogpts_characters(tmp_path):
    text = TEXT * 30
    ids = nanogpt_folder(tmp_path / "char", text)
    module = module_of(tmp_path / "char")
    assert module.vocab_size == len(ids) + 1  # the end of text behind them
    assert module.tokenizer.pieces[:-1] == [character.encode() for character in ids]
    assert module.tokenizer.separator == len(ids)
    both = [*stream(module, "train").tolist(), *stream(module, "val").tolist()]
    assert both == module.encode(text)
    assert module.decode(both) == text
    assert module.token_bytes[both].sum() == len(text.encode())
    assert "has no token for 'Q'" in message(lambda: module.encode("Quer"))
    (tmp_path / "a.txt").write_text(text)
    write_tokens([str(tmp_path / "a.txt")], str(tmp_path / "ours"), str(tmp_path / "char" / "meta.pkl"))
    again = module_of(tmp_path / "ours")
    assert again.tokenizer.sha256 == module.tokenizer.sha256
    assert again.decode(stream(again, "train").tolist()).startswith(text[:100])
    outside = json.loads(module.tokenizer.content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(outside))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).pieces == module.tokenizer.pieces


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nothing",
        pickle.dumps([1, 2]),
        pickle.dumps({"itos": {0: "a"}}),
        pickle.dumps({"stoi": {}}),
        pickle.dumps({"stoi": {"ab": 0}}),
        pickle.dumps({"stoi": {"a": 1}}),
        pickle.dumps({"stoi": {"a": 0, "b": 0}}),
        pickle.dumps({"stoi": {"a": "0"}}),
        pickle.dumps({"stoi": {"\ud800": 0}}),
    ],
)
def test_a_table_of_characters_that_is_none(tmp_path, content):
    (tmp_path / "meta.pkl").write_bytes(content)
    assert "is no table of characters" in message(lambda: open_tokenizer(str(tmp_path / "meta.pkl")))


def test_old_files_do_not_say_what_kind_of_model_they_hold(bpe, tmp_path):
    parts = json.loads(Path(bpe).read_text())
    del parts["model"]["type"]  # as GPT-2's own file on the hub
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    assert open_tokenizer(str(tmp_path / "tokenizer.json")).pieces == open_tokenizer(bpe).pieces


def test_a_table_of_characters_calls_nothing(tmp_path):
    class Call:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "called"),))

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Call()}))
    assert "it names posix.mkdir" in message(lambda: open_tokenizer(str(tmp_path / "meta.pkl")))
    assert not (tmp_path / "called").exists()


def test_windows_of_byte_token_files_are_those_of_the_text(tmp_path):
    (tmp_path / "a.txt").write_text("some words, again and again; " * 60)
    write_tokens([str(tmp_path / "a.txt")], str(tmp_path / "out"))
    ours = TokenFiles(str(tmp_path / "out"), context_length=16, batch_size=4, seed=3, shuffle_block=0)
    ours.setup()
    theirs = TextFiles(str(tmp_path / "a.txt"), context_length=16, batch_size=4, seed=3)
    theirs.setup()
    for mine, other in zip(ours.train_dataloader(), theirs.train_dataloader(), strict=True):
        assert torch.equal(mine["tokens"], other["tokens"])


def message(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_documents_are_named_or_left_out(bpe, tmp_path):
    good = json.dumps({"text": TEXT})
    bad = {
        '{"text": ': "line 2 is not JSON",
        "[1]": "line 2 is not JSON (an object was expected)",
        '{"body": "x"}': "line 2 has no text under 'text' (it has body)",
        '{"text": 3}': "line 2 has no text under 'text'",
        '{"text": "\\ud800"}': "line 2 has a character that is none",
        "[" * 100000: "line 2 is not JSON",
    }
    path = tmp_path / "a.jsonl"
    for n, (line, told) in enumerate(bad.items()):
        path.write_text(f"{good}\n{line}\n" + f"{good}\n" * 3)
        said = message(lambda: write_tokens([str(path)], str(tmp_path / "out"), bpe))
        assert told in said
        assert str(path) in said
        assert not (tmp_path / "out").exists()
        written = write_tokens([str(path)], str(tmp_path / f"out{n}"), bpe, 0, 0, on_bad_sample="skip")
        assert written.bad.count == 1
        assert written.description["splits"]["train"]["documents"] == 4
    (tmp_path / "b.txt").write_bytes(b"abc\xff")
    assert "is not UTF-8 at byte 3" in message(
        lambda: write_tokens([str(tmp_path / "b.txt")], str(tmp_path / "o"), bpe)
    )
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(f"{good}\n".encode() * 50)[:-20])
    assert "cannot be read after line" in message(lambda: write_tokens([str(tmp_path / "c.jsonl.gz")], "o", bpe))


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
