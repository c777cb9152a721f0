"""One run of the program for each kind, shared by all tests: one process here, two processes for DDP and for FSDP2."""

from collections.abc import Callable

import pytest

from .group import Ranks, run_group


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run_group("one", tmp_path_factory.mktemp("one"))


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
