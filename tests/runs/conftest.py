"""One run of the program for each kind, shared by all tests: one process here, two processes for DDP and for FSDP2."""

import warnings
from collections.abc import Callable

import pytest
import torch

from .fits import Record, program
from .group import run_group

Ranks = list[dict[str, Record]]


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = program("one", tmp_path_factory.mktemp("one"))
    torch.set_num_threads(threads)
    return [records]


@pytest.fixture(scope="session")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_group("ddp", tmp_path_factory.mktemp("ddp"))


@pytest.fixture(scope="session")
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_group("fsdp", tmp_path_factory.mktemp("fsdp"))


@pytest.fixture
def records(request: pytest.FixtureRequest) -> Callable[[str], Ranks]:
    """records(kind): what each rank saw in its fits."""
    return request.getfixturevalue
