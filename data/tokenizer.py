"""Tokenizers: bytes, a byte-level BPE that is trained here, any tokenizer.json whose tokens are pieces of text, and
nanoGPT's meta.pkl, a table of characters.

Every token id has its bytes, read from the vocabulary once: decoding joins them, and their lengths make bits per byte
right for any tokenizer. So a tokenizer that changes text (lower case, accents, NFKC, lost spaces) is refused. NFC
(Qwen, GPT-NeoX) writes the same characters in their usual spelling and passes: bytes are then those of that spelling.
None puts a space before a text, as Llama 2's file asks for: the bytes of the tokens are those of the text. Two
families say their bytes: byte-level ones (GPT-2, Llama 3: a character of a token stands for one byte) and
SentencePiece's (Llama 2: a low line for a space, <0x0A> for a byte); of a vocabulary of single characters they are
plain. The name of a special token that stands in a text is text like any other.
"""

import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moa_lightning.errors import UserError

BYTES = "bytes"
CHARACTERS = "meta.pkl"  # beside nanoGPT's token files where a token is a character
END_OF_TEXT = "<|endoftext|>"
NUL = "\0"  # what the tokenizer of bytes has between two texts
_DEEPSEEK = "<\uff5cend\u2581of\u2581sentence\uff5c>"
# what tokenizers call the token between two texts, by falling rank
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "<|eot_id|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]", _DEEPSEEK)
_SPACE = "\u2581"  # SentencePiece's space
_DROPPING = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")  # split where they drop spaces
LEAST_BPE = 257  # bytes and the end of text
MOST_TOKENS = 2**24


class Tokenizer(Protocol):
    """Text to token ids and back."""

    name: str
    """"bytes", or the file"""
    sha256: str
    """tells whether two tokenizers are the same"""
    pieces: list[bytes]
    """the bytes of each token id; none for special tokens"""
    separator: int
    """token between two documents"""
    separator_name: str
    """its name in the vocabulary"""
    needs_text: bool
    """whether documents must be UTF-8"""

    @property
    def content(self) -> bytes | None:
        """The tokenizer.json; None for bytes, which need none."""

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Token ids of each text, int64 (n,); the texts are UTF-8 where the tokenizer needs that."""

    def as_json(self) -> dict[str, Any]:
        """A tokenizer.json that turns the same text into the same tokens and adds none, as a whole."""


class ByteTokenizer:
    """A token is a byte; documents are separated by NUL, which counts as the byte that it is."""

    name = BYTES
    sha256 = BYTES
    separator = 0
    separator_name = NUL
    needs_text = False
    content = None

    def __init__(self) -> None:
        self.pieces = [bytes([value]) for value in range(256)]

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8).astype(np.int64) for text in texts]

    def as_json(self) -> dict[str, Any]:
        """A BPE without merges; NUL is a token of its own there, as it separates documents."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        vocabulary = {character: value for character, value in _alphabet().items() if value != self.separator}
        library = Library(models.BPE(vocab={**vocabulary, NUL: self.separator}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(NUL, normalized=False, special=True)])
        return json.loads(library.to_str())


class JsonTokenizer:
    """A tokenizer.json of the package tokenizers, without the space that it may put before a text; or a meta.pkl.

    Raises:
        UserError: no such file, no tokenizer, one that changes text, or whose tokens have no bytes or no end of text;
            in `encode`, a text with a character that the vocabulary cannot spell.
    """

    needs_text = True

    def __init__(self, path: str) -> None:
        from tokenizers import Tokenizer as Library

        self.name = path
        content = _read(path)
        if path.lower().endswith(".pkl"):
            content = _of_characters(path, content)
        try:
            self.library = Library.from_str(content.decode())
            parts = json.loads(content)
        except Exception as error:  # the package raises plain Exception
            raise UserError(
                f"tokenizer '{path}' is not a tokenizer.json ({_first_line(error)}): give another"
            ) from error
        self.content = content
        self.pieces = _pieces(path, self.library, parts)
        exact = _exact(path, parts)
        if exact != parts:
            self.library = Library.from_str(json.dumps(exact))
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        self.sha256 = hashlib.sha256(content).hexdigest()
        ends = (self.library.token_to_id(end) for end in _ENDS)
        separator = next((end for end in ends if end is not None), None)
        if separator is None:
            raise UserError(f"tokenizer '{path}' has no end-of-text token (one of {', '.join(_ENDS)}): add one")
        self.separator = separator
        self.separator_name = str(self.library.id_to_token(separator))

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        encoded = self.library.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        for text, one in zip(texts, encoded, strict=True):
            spelled = b"".join(map(self.pieces.__getitem__, one.ids))
            if spelled != text:
                self._check(text.decode(), spelled)
        return [np.array(one.ids, dtype=np.int64) for one in encoded]

    def _check(self, text: str, spelled: bytes) -> None:
        """UserError where tokens spell less than the text, in the usual spelling of its characters."""
        usual = text if self.library.normalizer is None else self.library.normalizer.normalize_str(text)
        wanted = usual.replace(_SPACE, " ").encode()  # SentencePiece does not tell these two apart
        if spelled in (wanted, usual.encode()):
            return
        ends = min(len(spelled), len(wanted))
        first = next((place for place in range(ends) if spelled[place] != wanted[place]), ends)
        kept = len(wanted[:first].decode(errors="ignore"))  # in whole characters
        raise UserError(
            f"tokenizer '{self.name}' has no token for {usual[kept : kept + 1]!r}: take it out of the text, or give "
            "another tokenizer"
        )

    def as_json(self) -> dict[str, Any]:
        """The file itself, less what cuts a text, fills it up or adds a space before or tokens around it."""
        return {**json.loads(self.library.to_str()), "post_processor": None}


def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a name: "bytes", or the path of a tokenizer.json or meta.pkl. Errors as in `JsonTokenizer`. A
    file is read once, and anew where it has changed."""
    if name == BYTES:
        return ByteTokenizer()
    path = Path(name)
    if not path.is_file():
        return JsonTokenizer(name)  # which says what is wrong
    state = path.stat()
    return _read_once(name, path.resolve(), (state.st_ino, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=8)
def _read_once(name: str, path: Path, state: tuple[int, ...]) -> Tokenizer:
    return JsonTokenizer(name)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE (pre-tokenised as GPT-2's) with END_OF_TEXT as token 0; `.save(path)` writes tokenizer.json.

    Raises:
        UserError: a vocabulary that has no room for the 256 bytes and the end of text, or that the texts do not fill.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if not LEAST_BPE <= vocab_size <= MOST_TOKENS:
        raise UserError(f"vocab_size is {vocab_size} but must lie between {LEAST_BPE} and {MOST_TOKENS:,}")
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    found = library.get_vocab_size()
    if found < vocab_size:
        raise UserError(f"vocab_size is {vocab_size} but the text has pieces for {found} tokens only: lower it")
    return library


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(
            f"tokenizer '{path}' cannot be read ({error.strerror}): give bytes, a tokenizer.json or a meta.pkl"
        ) from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and containers of them; calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _of_characters(path: str, content: bytes) -> bytes:
    """The tokenizer.json of a meta.pkl: nanoGPT's ids, and behind them the end of text that its files do without."""
    try:
        ids = _PlainUnpickler(io.BytesIO(content)).load()["stoi"]
        known = all(isinstance(text, str) and len(text) == 1 and type(number) is int for text, number in ids.items())
        if not ids or not known or sorted(ids.values()) != list(range(len(ids))):
            raise ValueError("stoi does not number single characters from 0 on")
        for text in ids:
            text.encode()
    except Exception as error:  # a pickle that is none raises whatever its bytes lead to
        raise UserError(
            f"'{path}' is no table of characters as nanoGPT's prepare.py writes it ({_first_line(error)}): give another"
        ) from error
    end = {"id": len(ids), "content": END_OF_TEXT, "special": True, "normalized": False}
    parts = {
        "version": "1.0",
        "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": dict(sorted(ids.items(), key=lambda item: item[1])), "merges": []},
    }
    return json.dumps(parts).encode()  # by hand: the package writes other bytes in other versions


def _has_characters(parts: dict[str, Any]) -> bool:
    """Whether the tokens of a tokenizer.json are single characters and nothing is done to text before them."""
    model = parts["model"]  # old files do not say its type
    plain = model.get("type", "BPE") == "BPE" and not model.get("merges", True) and not parts.get("normalizer")
    return plain and not parts.get("pre_tokenizer") and all(len(token) == 1 for token in model["vocab"])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _pieces(path: str, library: Any, parts: dict[str, Any]) -> list[bytes]:
    """The bytes of every token id; ids that the vocabulary leaves out have none."""
    vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
    added = library.get_added_tokens_decoder()
    size = max(vocabulary.values(), default=-1) + 1
    if not 0 < size <= MOST_TOKENS:
        raise UserError(f"tokenizer '{path}' has token ids up to {size - 1}, where 0 to {MOST_TOKENS - 1:,} may be")
    piece = _piece_of(path, parts)
    pieces = [b""] * size
    for token, number in vocabulary.items():
        if number in added:
            pieces[number] = b"" if added[number].special else token.encode()
        else:
            pieces[number] = piece(token)
    return pieces


def _exact(path: str, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer without the space before a text, and without a decoder that takes one away.

    Raises:
        UserError: there is a part that changes text, so that the bytes of tokens would not be those of the text.
    """
    normalizers, splitters = _flat(parts.get("normalizer")), _flat(parts.get("pre_tokenizer"))
    changing = [p["type"] for p in normalizers if p["type"] not in ("Prepend", "NFC") and not _writes_spaces(p)]
    dropping = [part["type"] for part in splitters if part["type"] in _DROPPING or part.get("behavior") == "Removed"]
    if changing or dropping:
        raise UserError(
            f"tokenizer '{path}' changes text ({', '.join(changing + dropping)}), so bits per byte would be wrong: "
            "give one that keeps every character, or train one with moa data tokenizer"
        )
    kept: dict[str, Any] = {
        name: _without_prefix(parts[name]) for name in ("normalizer", "pre_tokenizer", "decoder") if name in parts
    }
    return {**parts, **kept}


def _writes_spaces(part: dict[str, Any]) -> bool:
    """Whether a normalizer is SentencePiece's, which spells spaces in another way and nothing else."""
    return part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == _SPACE


def _parts_key(part: dict[str, Any]) -> str | None:
    """Where a sequence holds its parts."""
    return next((key for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A part, or the parts of a sequence."""
    if part is None:
        return []
    key = _parts_key(part)
    return [each for inner in part[key] for each in _flat(inner)] if key else [part]


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A part that puts nothing before a text and takes nothing from its beginning; None for one that does only that."""
    if part is None or part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " "):
        return None
    if key := _parts_key(part):
        return {**part, key: [kept for each in part[key] if (kept := _without_prefix(each)) is not None]}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    if part["type"] == "Metaspace":
        return {name: value for name, value in part.items() if name != "add_prefix_space"} | {"prepend_scheme": "never"}
    return part


def _piece_of(path: str, parts: dict[str, Any]) -> Any:
    """How this kind of tokenizer spells bytes: a function from token to bytes."""
    if _has_characters(parts):
        return str.encode
    # "type" of every part below these, and what stands in their patterns
    spelled = json.dumps(
        [parts.get("pre_tokenizer"), parts.get("decoder"), parts.get("normalizer")], ensure_ascii=False
    )
    if '"ByteLevel"' in spelled:
        return _byte_level
    if '"Metaspace"' in spelled or _SPACE in spelled:
        return _sentence_piece
    raise UserError(
        f"tokenizer '{path}' does not say which bytes its tokens stand for: give one that is byte-level or of "
        "SentencePiece's kind, or train one with moa data tokenizer"
    )


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """GPT-2's characters of the 256 bytes: visible Latin-1 ones are themselves, the others follow from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + n): value for n, value in enumerate(hidden)}


def _byte_level(token: str) -> bytes:
    alphabet = _alphabet()
    return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()
