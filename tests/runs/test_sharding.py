"""FSDP2 shards: each of two processes holds about half of everything."""

import pytest

from .fits import FITS


@pytest.mark.parametrize("name", FITS)
def test_each_process_holds_half_of_parameters_and_optimiser_state(fsdp, name):
    """A share is over one half by what cannot be halved: tokens and position tables are single rows, which the first
    process holds; seven coefficients are four and three."""
    first, second = (rank[name] for rank in fsdp)
    for share in ("parameters", "optimizer", *(() if name.endswith("gelu") else ("mixing",))):
        assert first.shares[share] + second.shares[share] == pytest.approx(1.0), share
        assert first.shares[share] < (0.6 if share == "mixing" else 0.54), share
    assert first.plain == second.plain == []


@pytest.mark.parametrize("name", FITS)
def test_without_sharding_each_process_holds_all(ddp, name):
    assert all(rank[name].shares["parameters"] == rank[name].shares["optimizer"] == 1.0 for rank in ddp)
