"""The shipped sizes are what their names say, and the closed forms are torch's own counts, on the meta device."""

from typing import Any

import pytest
import torch
import yaml

from moa_lightning import FFNConfig
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from tests.models.nets import CONFIGS, fragment

VOCAB = 50_257  # of GPT-2's tokenizer, with which the sizes are named
NOMINAL = {"124m": 0.12e9, "250m": 0.25e9, "500m": 0.5e9, "1b": 1e9, "2b": 2e9}
EXPERTS = {f"{size}_moe": parameters for size, parameters in NOMINAL.items()}
SHIPPED = sorted(path.stem.removeprefix("gpt_") for path in (CONFIGS / "language").glob("gpt_*.yaml"))
FFNS = ("gelu", "swiglu", "la", "la_gated_both", "moa", "moa_gated_both")


def settings(size: str) -> dict[str, Any]:
    content = yaml.safe_load((CONFIGS / "language" / f"gpt_{size}.yaml").read_text())
    return {**content["model"]["init_args"], "context_length": content["data"]["init_args"]["context_length"]}


def on_meta(size: str, ffn: str) -> GPT:
    given = settings(size)
    layer = FFNConfig(**{**fragment(ffn).as_dict(), **given["ffn"]})
    with torch.device("meta"):
        return GPT(
            GPTConfig(**given["gpt"]),
            layer,
            VOCAB,
            given["context_length"],
            moe=MoEConfig(**given.get("moe", {})),
        )


def test_every_size_of_the_paper_is_there_dense_and_with_experts() -> None:
    assert set(SHIPPED) >= {*NOMINAL, *EXPERTS}


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("size", SHIPPED)
def test_a_shipped_size_is_its_name_and_its_closed_forms_are_the_counts(size: str, ffn: str) -> None:
    net = on_meta(size, ffn)
    moe, dim = net.moe, net.config.dim
    counts = {name: parameter.numel() for name, parameter in net.named_parameters()}  # a tied matrix stands once
    total, tables = sum(counts.values()), sum(counts.get(f"{name}.weight", 0) for name in ("embed", "head"))
    experts = sum(count for name, count in counts.items() if ".experts." in name)
    active = total - (experts * (moe.experts - moe.top_k) // moe.experts if moe.experts else 0)
    assert net.parameter_count() == total
    assert net.parameter_count(embeddings=False) == total - tables
    assert net.parameter_count(active=True) == active
    assert net.parameter_count(active=True, embeddings=False) == active - tables
    # 2 FLOPs for each parameter of a matrix that a token meets, and attention to half of the context
    products = 2 * (net.parameter_count(active=True, embeddings=False) + VOCAB * dim)
    attention = net.config.depth * 2 * dim * net.context_length
    assert net.flops_per_token() == pytest.approx(products + attention, rel=5e-4)
    nominal = {**NOMINAL, **EXPERTS}.get(size)
    if nominal is not None:
        assert total == pytest.approx(nominal, rel=0.04)


@pytest.mark.parametrize("ffn", ["gelu", "moa_gated_both"])
@pytest.mark.parametrize(("experts", "dense"), [("500m_moe", "124m"), ("1b_moe", "250m"), ("2b_moe", "500m")])
def test_a_token_meets_as_many_parameters_as_in_a_dense_net(experts: str, dense: str, ffn: str) -> None:
    active = on_meta(experts, ffn).parameter_count(active=True)
    assert active == pytest.approx(on_meta(dense, ffn).parameter_count(), rel=0.02)
