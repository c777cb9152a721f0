"""Sampling: filters against their definitions, continuation beyond the context, a cache read like the text."""

import pytest
import torch
from torch import Tensor

from moa_lightning import FFNConfig
from moa_lightning.errors import UserError
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.sampling import Sampling, continuation
from tests.models.nets import shake

LOGITS = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.8}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"min_p": 0.28}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"min_p": 1.0}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),  # of the three, two hold 0.83
        ({"top_k": 3, "min_p": 0.4}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_filters_are_their_definitions(options: dict, expected: list[float]) -> None:
    order = torch.tensor([2, 0, 3, 1])
    for logits, wanted in ((LOGITS, torch.tensor(expected)), (LOGITS[:, order], torch.tensor(expected)[order])):
        assert Sampling(**options).probabilities(logits)[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_rows_of_a_batch_are_filtered_each_for_itself() -> None:
    p = Sampling(top_p=0.6).probabilities(torch.stack([LOGITS[0], LOGITS[0].flip(0)]))
    assert torch.allclose(p[0], p[1].flip(0))


def test_extreme_logits_are_no_nan() -> None:
    p = Sampling(temperature=1e-6, top_k=2, top_p=0.5, min_p=0.5).probabilities(torch.tensor([[1e30, -1e30, 0.0]]))
    assert p.tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**options)


class Counting:
    """Continues n by n + 1; remembers what it was given to read."""

    context_length = 6

    def __init__(self) -> None:
        self.read: list[list[int]] = []

    def new_cache(self) -> "Counting":
        self.length = 0
        return self

    def __call__(self, tokens: Tensor, cache: "Counting", *, last: int) -> Tensor:
        self.length += tokens.shape[1]
        assert self.length <= self.context_length
        self.read.append(tokens[0].tolist())
        return torch.nn.functional.one_hot(tokens[:, -last:] + 1, 32).float()


def test_each_token_is_read_once_and_half_the_context_again_when_it_is_full() -> None:
    net = Counting()
    greedy = Sampling(temperature=0.0)
    new = continuation(net, torch.tensor([[7, 8]]), 9, torch.Generator(), greedy)
    assert torch.cat(list(new), 1).tolist() == [list(range(9, 18))]
    assert net.read == [[7, 8], [9], [10], [11], [12], [11, 12, 13], [14], [15], [16]]


def test_of_a_long_prompt_the_last_context_counts() -> None:
    net = Counting()
    new = continuation(net, torch.arange(10)[None], 1, torch.Generator(), Sampling(temperature=0.0))
    assert [token.item() for token in new] == [10]
    assert net.read == [[4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("experts", [0, 4])
def test_rows_stop_each_at_its_end_and_are_otherwise_what_they_were(
    cached: bool, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than the context, so that it is read again meanwhile."""
    net = shake(GPT(GPTConfig(depth=2, dim=24, num_heads=2), FFNConfig("moa"), 13, 10, moe=MoEConfig(experts)))
    net, prompts = net.eval(), torch.tensor([[1, 2, 3]] * 3)
    if not cached:
        monkeypatch.setattr(net, "new_cache", lambda: None)

    def rows(stop: int | None) -> list[list[int]]:
        generator = torch.Generator().manual_seed(5)
        return torch.cat(list(continuation(net, prompts, 60, generator, Sampling(), stop=stop)), 1).tolist()

    free, stopped = rows(None), rows(7)
    ends = [row.index(7) for row in free]
    assert len(set(ends)) == 3, "rows that end at different places"
    assert [row[: end + 1] for row, end in zip(stopped, ends, strict=True)] == [
        row[: end + 1] for row, end in zip(free, ends, strict=True)
    ]
    assert all(set(row[end:]) == {7} for row, end in zip(stopped, ends, strict=True))
    assert len(stopped[0]) == max(ends) + 1 < 60
