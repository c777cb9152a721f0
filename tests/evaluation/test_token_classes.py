"""Classes of tokens: every kind of character, keywords as whole words, patches by their image's own brightness."""

import torch

from moa_lightning.evaluation.token_classes import patch_classes, text_classes

SIGN = {"letters": "a", "digits": "1", "whitespace": "_", "punctuation": ".", "keywords": "K", "other": "?"}


def classes_of(*pieces: str) -> str:
    found = text_classes([list(pieces)])
    return "".join(SIGN[found.names[i]] for i in found.ids[0].tolist())


def test_every_character_has_the_class_it_is_known_by() -> None:
    assert classes_of(*"for fort in x9:\n\té€\x00") == "KKK_aaaa_KK_a1.__a??"


def test_a_keyword_is_a_whole_word() -> None:
    assert classes_of(*"if iffy elif_ None") == "KK_aaaa_aaaa._KKKK"


def test_pieces_of_several_characters_count_by_their_first_visible_one() -> None:
    assert classes_of("re", "turn", " x", " 12", "  ", " if", "(a", "") == "KKa1_K.?"


def test_foreground_is_brighter_than_its_own_image() -> None:
    image = torch.zeros(2, 3, 4, 6)
    image[0, :, :2, 2:4] = 1.0  # patch 1 of image 0
    image[1] = 0.9
    image[1, :, 2:, 4:] = 1.0  # patch 5 of a bright image
    found = patch_classes(image, patch=2, prefix=1)
    assert found.ids.tolist() == [[-1, 0, 1, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 1]]
    assert found.names == ("background", "foreground")
