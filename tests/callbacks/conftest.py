"""One thread for every test here, and a clock that tests can move."""

from types import SimpleNamespace

import pytest
import torch

from moa_lightning.callbacks import common


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock for the callbacks that the test moves: fake_time[0] is the time in seconds."""
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now
