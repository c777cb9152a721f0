"""Document sources: all kinds give the same documents, in bounded memory; mistakes are one sentence."""

import gzip
import json
import os
import sys

import pytest

from data import TextFiles
from data.documents import PIECE, cut_place
from data.sources import Bad, documents
from data.token_writer import write_tokens
from data.tokenizer import open_tokenizer
from moa_lightning.errors import UserError
from tests.data.test_shards import write_tar
from tests.data.texts import TEXT, lines, message


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
