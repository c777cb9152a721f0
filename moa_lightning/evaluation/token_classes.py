"""Classes of tokens that a mix may treat differently: kinds of characters in text, bright and dark patches in images.

Text: a token belongs to the class of its first character that is no space; letters of a whole Python keyword are a
class of their own, also in text that is no Python. Images: a patch is foreground where its mean intensity lies above
that of its image. For light strokes on black, as in MNIST, that is the ink; in natural images it only parts bright from
dark patches, which need not be an object and its surroundings. [O]
"""

import keyword
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

TEXT = ("letters", "digits", "whitespace", "punctuation", "keywords", "other")
IMAGE = ("background", "foreground")
KEYWORDS = re.compile(r"\b(?:" + "|".join(keyword.kwlist) + r")\b")


@dataclass(frozen=True)
class TokenClasses:
    """The tokens of a batch: what class each belongs to, and what it looks like."""

    names: tuple[str, ...]
    ids: Tensor
    """int64 (B, T), index into names; -1 for a token of no class, such as a class token"""
    pieces: list[list[str]] | None = None
    """of text: the characters of each token"""
    images: Tensor | None = None
    """of images: (B, 3, H, W) in [0, 1] on the CPU"""
    patch: int = 0
    """side of a patch in pixels"""
    prefix: int = 0
    """tokens before the first patch"""


def text_classes(pieces: list[list[str]]) -> TokenClasses:
    """Classes of text tokens, given as the characters of each, (B, T)."""
    ids = torch.tensor([[TEXT.index(name) for name in _row(row)] for row in pieces])
    return TokenClasses(TEXT, ids, pieces=pieces)


def _row(pieces: list[str]) -> list[str]:
    text = "".join(pieces)
    inside = {place for match in KEYWORDS.finditer(text) for place in range(*match.span())}
    found, start = [], 0
    for piece in pieces:
        place = start + len(piece) - len(piece.lstrip())
        found.append("keywords" if place in inside and piece.strip() else _character(piece))
        start += len(piece)
    return found


def _character(piece: str) -> str:
    first = piece.lstrip()[:1]
    if not first:
        return "whitespace" if piece else "other"
    if first.isalpha():
        return "letters"
    if first.isdigit():
        return "digits"
    return "punctuation" if first.isascii() and first.isprintable() else "other"


def patch_classes(images: Tensor, patch: int, prefix: int) -> TokenClasses:
    """Classes of the tokens of a vision transformer, row by row, for images (B, 3, H, W) in [0, 1].

    Args:
        patch: side of a patch in pixels.
        prefix: tokens before the first patch, of no class.
    """
    means = F.avg_pool2d(images.mean(1, keepdim=True), patch).flatten(1)  # (B, N)
    ids = (means > means.mean(1, keepdim=True)).long()
    return TokenClasses(IMAGE, F.pad(ids, (prefix, 0), value=-1), images=images, patch=patch, prefix=prefix)
