"""Tokenizers: what is decoded is what was encoded, and every token has its bytes; mistakes are one sentence."""

import json
import os
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data.token_writer import train_tokenizer, write_tokens
from data.tokenizer import END_OF_TEXT, open_tokenizer, train_bpe
from tests.data.texts import TEXT, lines, message, module_of, nanogpt_folder, stream


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


@pytest.mark.parametrize("kind", ["bytes that no text had", "an unknown token", "unknown characters alike"])
def test_a_character_that_tokens_cannot_spell_is_named(tmp_path, kind):
    """Counted as less text than there is, bits per byte would be wrong."""
    if kind == "bytes that no text had":
        library = Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.train_from_iterator(["the fox "] * 9, trainers.BpeTrainer(special_tokens=[END_OF_TEXT]))
        library.save(str(tmp_path / "t.json"))
    else:
        unknown = "<unk>" if kind == "an unknown token" else "?"
        vocabulary = {token: number for number, token in enumerate(["</s>", unknown, "\u2581", *"thefox"])}
        library = Tokenizer(models.BPE(vocabulary, [], unk_token=unknown))
        library.normalizer = as_spaces()
        library.add_special_tokens(["</s>"] + ["<unk>"] * (unknown == "<unk>"))
        library.save(str(tmp_path / "t.json"))
    tokenizer = open_tokenizer(str(tmp_path / "t.json"))
    (tokens,) = tokenizer.encode([b"the fox"])
    assert b"".join(tokenizer.pieces[token] for token in tokens) == b"the fox"
    assert "has no token for 'é'" in message(lambda: tokenizer.encode([b"the", "the fox é fox".encode()]))
    (tmp_path / "a.txt").write_text("the fox QUICK the fox")
    assert "has no token for 'Q'" in message(
        lambda: write_tokens([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(tmp_path / "t.json"))
    )
    assert not (tmp_path / "out").exists()


def test_the_low_line_of_sentence_pieces_passes_as_the_space_that_it_stands_for(tmp_path):
    tokenizer = open_tokenizer(sentence_pieces(tmp_path, "t.json", normalizer=as_spaces()))
    first, second = tokenizer.encode([b"a a", "a\u2581a".encode()])
    assert first.tolist() == second.tolist()


def test_deepseeks_end_of_text_is_known(bpe, tmp_path):
    content = Path(bpe).read_text().replace(END_OF_TEXT, "<\uff5cend\u2581of\u2581sentence\uff5c>")
    (tmp_path / "t.json").write_text(content)
    assert open_tokenizer(str(tmp_path / "t.json")).separator == open_tokenizer(bpe).separator


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
