"""LearnedMixes on mixtures of experts: names, numbers by expert against the formula, curves, resumed and later runs."""

import json

import numpy as np
import pytest
import torch

from moa_lightning.callbacks import LearnedMixes, MixingTelemetry, figures, learned_mixes
from moa_lightning.callbacks.mixing import capture, pre_activations, start_coefficients
from moa_lightning.callbacks.seen_mixes import Seen, SeenByExperts, see
from moa_lightning.evaluation.token_classes import TokenClasses, text_classes
from moa_lightning.experts import Experts, Rows
from moa_lightning.feedforward import FFNConfig
from moa_lightning.moe import MoE, MoEConfig
from moa_lightning.reports.mixes import run_mixes
from tests.layers import randomise

from .test_learned_mixes import WORD, config, mixing_json
from .toy import DIM, ToyTask, events, fit, toy_loader

LAYERS = [f"block0{i}/{part}/up" for i in (0, 1) for part in ("experts", "shared")]


class MoEBlock(torch.nn.Module):
    def __init__(self, ffn: FFNConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.mlp = MoE(DIM, ffn, moe)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)[0]


class MoETask(ToyTask):
    """Two blocks of three routed experts and a shared one; the samples are said to be the text WORD."""

    def __init__(self, ffn: FFNConfig | None = None, moe: MoEConfig | None = None) -> None:
        super().__init__()
        moe = moe or MoEConfig(experts=3, top_k=2, shared_experts=1)
        self.net.blocks = torch.nn.ModuleList(MoEBlock(ffn or config(), moe) for _ in range(2))
        randomise(self.net)

    def token_classes(self, batch) -> TokenClasses:
        return text_classes([WORD] * len(batch["x"]))


def test_every_mix_has_one_name_everywhere(tmp_path, monkeypatch):
    panels = {}
    for module, name in ((learned_mixes, "draw_over_time"), (learned_mixes, "text_examples")):
        drawn = getattr(module, name)

        def note(first, *rest, drawn=drawn, name=name):
            titles = [first] if isinstance(first, str) else [panel.name for panel in first]
            panels.setdefault(name, set()).update(titles)
            return drawn(first, *rest)

        monkeypatch.setattr(module, name, note)
    fit(MoETask(), tmp_path / "run", [LearnedMixes(), MixingTelemetry()], max_steps=4)
    found = mixing_json(tmp_path / "run")["layers"]
    assert list(found) == LAYERS
    assert [layer["module"] for layer in found.values()][:2] == [
        f"blocks.0.mlp.{part}.up_mix" for part in ("experts", "shared")
    ]
    assert panels == {"draw_over_time": set(LAYERS), "text_examples": {n for n in LAYERS if "shared" in n}}
    tags = {tag for tag in events(tmp_path / "run").Tags()["scalars"] if tag.startswith("mixing/")}
    assert {tag.removesuffix("/gate_entropy") for tag in tags if tag.endswith("/gate_entropy")} == {
        f"mixing/{name}" for name in LAYERS
    }
    assert {tag.split("/entropy/")[0] for tag in tags if "/entropy/" in tag} == {
        f"mixing/{name}" for name in LAYERS if "shared" in name
    }


def test_the_report_has_all_of_them_and_says_what_it_leaves_out(tmp_path):
    for name, task in (("routed", MoETask()), ("dense", ToyTask(config()))):
        fit(task, tmp_path / name, [LearnedMixes()], max_steps=4)
    tables = [run_mixes(tmp_path / name, [], [])[1] for name in ("routed", "dense")]
    assert [row[0] for row in tables[0].rows] == LAYERS
    assert ["Routed experts" in table.note for table in tables] == [True, False]


def test_numbers_of_routed_experts_are_those_of_the_formula(tmp_path):
    """Against a loop over experts and tokens, in float64, with the routing as the formula of the router has it."""
    task = MoETask()
    fit(task, tmp_path / "run", [LearnedMixes()], max_steps=4)
    layer = mixing_json(tmp_path / "run")["layers"]["block00/experts/up"]
    x = next(iter(toy_loader(8, seed=1)))["x"].flatten(0, 1).double()  # the validation's first batch
    moe = task.net.blocks[0].mlp
    chosen = (x @ moe.router.weight.detach().double().T).topk(2).indices
    mix, coefficients, entropies = moe.experts.up_mix, [], []
    for e in range(3):
        p = torch.sigmoid(x[(chosen == e).any(-1)] @ mix.gate_weight[e].detach().double().T)
        coefficients.append(mix.base[e].detach().double() + p - 0.5)
        entropies.append(-(p * p.log2() + (1 - p) * (1 - p).log2()).mean(-1))
    assert layer["experts"]["rows"] == [len(each) for each in coefficients]
    for e in range(3):
        np.testing.assert_allclose(layer["experts"]["mean"][e], coefficients[e].mean(0), rtol=1e-4)
        assert layer["experts"]["entropy"][e] == pytest.approx(entropies[e].mean().item(), rel=1e-4)
    np.testing.assert_allclose(layer["mean"], torch.cat(coefficients).mean(0), rtol=1e-4)
    np.testing.assert_allclose(layer["std"], torch.cat(coefficients).std(0, correction=0), rtol=1e-3)
    assert layer["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)
    assert 0 < layer["pre_activation_within_4"] <= 1
    assert layer["entropy_by_class"] == layer["class_shares"] == {}


@pytest.mark.parametrize("branches", ["one", "pairs"])
def test_rows_and_slots_of_the_same_tokens_are_seen_alike(branches: str):
    """Slots with empty ones among them, as a capacity and float64 make them; the second expert has no token."""
    experts = Experts(3, DIM, FFNConfig("moa", "gated", branches=branches, dictionary=("identity", "gelu")))
    randomise(experts)
    (module,) = experts.mixings().values()
    x, slots = torch.randn(5, DIM), torch.zeros(3, 4, DIM)
    slots[0, :2], slots[2, :3] = x[:2], x[2:]
    rows = Rows(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([2, 2, 5], dtype=torch.int32))
    packed, padded = see(module, x, rows), see(module, slots)
    assert packed.used == [0, 2]
    assert packed.rows.tolist() == padded.rows.tolist() == [2, 0, 3]
    for name in ("sums", "squares", "entropies"):
        torch.testing.assert_close(getattr(padded, name), getattr(packed, name))
    assert packed.facts()["mean"][1] is packed.facts()["entropy"][1] is None
    json.dumps(packed.facts(), allow_nan=False)
    torch.testing.assert_close(capture(module, slots).coefficients, capture(module, x, rows).coefficients)
    if branches == "one":
        up = pre_activations(experts.up_proj, (slots,), experts.up_proj(slots))
        torch.testing.assert_close(up, experts.up_proj(x, rows))


def test_curves_of_experts_are_drawn_beside_their_mean(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        learned_mixes,
        "draw_over_time",
        lambda panels, *rest: (drawn.append(panels), figures.draw_over_time(panels, *rest))[1],
    )
    task = MoETask(config(mixing="la"))
    fit(task, tmp_path / "run", [LearnedMixes()], max_steps=4)
    (panel,) = [panel for panel in drawn[-1] if panel.name == "block01/experts/up"]
    mixes = task.net.blocks[1].mlp.experts.up_mix.base.detach().double().numpy()
    np.testing.assert_allclose(panel.experts, mixes @ learned_mixes.curve_values(config().dictionary), rtol=1e-6)
    assert panel.histogram is not None
    assert panel.experts.min(0)[0] <= panel.curves["now"][0] <= panel.experts.max(0)[0]
    layer = mixing_json(tmp_path / "run")["layers"]["block01/experts/up"]
    assert layer["entropy"] is None
    assert "entropy" not in layer["experts"]
    assert [path.name for path in (tmp_path / "run").glob("*/mixing-*")] == ["mixing-training-step000004.png"]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"capacity_factor": 1.0}, 40),  # two experts for each of 20 tokens; the capacity holds in training only
        ({"router": "expert_choice", "capacity_factor": 2.0}, 48),  # 3 experts take ceil(2 * 5 / 3) of each of 4 texts
    ],
)
def test_other_routers_without_shared_experts(tmp_path, options, rows):
    task = MoETask(moe=MoEConfig(experts=3, top_k=2, **options))
    fit(task, tmp_path / "run", [LearnedMixes(), MixingTelemetry()], max_steps=4)
    found = mixing_json(tmp_path / "run")["layers"]
    assert list(found) == ["block00/experts/up", "block01/experts/up"]
    assert sum(found["block00/experts/up"]["experts"]["rows"]) == rows
    assert (tmp_path / "run/pictures/mixing-training-step000004.png").exists()


def test_experts_given_their_start_have_one_curve_at_it():
    """By ffn.start_from: α of each expert; drawn is their mean."""
    mix = Experts(2, DIM, config(mixing="la")).up_mix
    mix.start_at(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]]))
    np.testing.assert_allclose(start_coefficients(mix), [0.5, 0.0, 1.5])


def test_a_run_that_remembers_curves_under_other_names_goes_on():
    watcher = LearnedMixes()
    watcher._marks = {"0.25": {"step": 3, "means": {"block00/up": [1.0, 0.0, 0.0]}}}
    mix = Experts(2, DIM, config()).up_mix
    counts, ones = torch.ones(2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    panel = watcher._over_time("block00/experts/up", mix, SeenByExperts(counts, ones, ones, None), step=8)
    assert list(panel.curves) == ["start", "now"]
    dense = watcher._over_time("block00/up", mix, Seen(torch.ones(1, 2, 3, dtype=torch.float64), None), step=8)
    assert list(dense.curves) == ["start", "25%", "now"]
    assert dense.experts is None
