"""Folders for transformers: the same logits, the same greedy text through its caches, the same tokens."""

import json
import sys
from pathlib import Path

import pytest
import torch

from data.tokenizer import open_tokenizer, train_bpe
from moa_lightning import FFNConfig
from moa_lightning.exchange.hub_export import write_hub_folder
from moa_lightning.models import GPT, GPTConfig
from moa_lightning.moe import MoEConfig
from moa_lightning.sampling import Sampling, continuation

transformers = pytest.importorskip("transformers")

STOCK = {
    "qwen3": ("Qwen3ForCausalLM", {"num_kv_heads": 2}, FFNConfig(form="gated", activation="silu", bias=False), {}),
    "apertus": ("ApertusForCausalLM", {"tie_embeddings": True}, FFNConfig(bias=False, hidden_ratio=2.5), {}),
    "llama": (
        "LlamaForCausalLM",
        {"qk_norm": False, "num_kv_heads": 1, "rope_theta": 500.0},
        FFNConfig(form="gated", activation="gelu"),
        {},
    ),
    "arcee": ("ArceeForCausalLM", {"qk_norm": False}, FFNConfig(activation="relu2"), {}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        {"num_kv_heads": 2},
        FFNConfig(form="gated", activation="silu", bias=False, hidden_ratio=1.0),
        {"experts": 4, "top_k": 2},
    ),
    "qwen3_moe_1": (
        "Qwen3MoeForCausalLM",
        {},
        FFNConfig(form="gated", activation="relu", bias=False, hidden_ratio=1.0),
        {"experts": 3, "top_k": 1},
    ),
}
OWN = {
    "la": ({"tie_embeddings": True}, FFNConfig("la", bias=False), {}, "mixes activations"),
    "moa": ({"num_kv_heads": 2}, FFNConfig("moa", "gated", branches="both", base="held"), {}, "mixes activations"),
    "moe": (
        {"qk_norm": False},
        FFNConfig("moa", hidden_ratio=1.0),
        {"experts": 4, "top_k": 2, "shared_experts": 1, "balance": "bias"},
        "mixes activations",
    ),
    "expert_choice": (
        {},
        FFNConfig("moa", hidden_ratio=1.0),
        {"experts": 4, "router": "expert_choice", "capacity_factor": 1.0, "see_later_tokens": True},
        "mixes activations",
    ),
    "bias": ({}, FFNConfig(), {}, "biases"),
    "xielu": ({}, FFNConfig(activation="xielu", bias=False), {}, "activation xielu"),
}
CONTEXT = 48


def net_of(gpt: dict, ffn: FFNConfig, moe: dict) -> GPT:
    """Every tensor moved from its start, where a projection of zeros would hide what is before it."""
    size = GPTConfig(**{"depth": 2, "dim": 32, "num_heads": 4, **gpt})
    net = GPT(size, ffn, 256, CONTEXT, moe=MoEConfig(**moe)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor += 0.15 * torch.randn(tensor.shape, generator=generator)
    return net


def greedy(net: GPT, prompt: torch.Tensor, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.cat(list(continuation(net, prompt, count, generator, Sampling(0.0))), 1)[0].tolist()


def prompts() -> torch.Tensor:
    return torch.randint(1, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def loaded(folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)


def written_continuations(model, prompt: torch.Tensor, **options) -> list[int]:
    """What transformers adds; no token of the vocabulary ends the text."""
    mask = torch.ones_like(prompt)
    new = model.generate(
        prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=999, pad_token_id=0, **options
    )
    return new[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_architecture_computes_what_the_net_computes(name: str, tmp_path: Path) -> None:
    architecture, gpt, ffn, moe = STOCK[name]
    net = net_of(gpt, ffn, moe)
    written = write_hub_folder(net, open_tokenizer("bytes"), tmp_path / "out")
    assert (written.architecture, written.reason) == (architecture, None)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, told = loaded(tmp_path / "out")
    assert type(model).__name__ == architecture
    assert not any(told.values()), told
    assert sum(p.numel() for p in model.parameters()) == net.parameter_count()
    with torch.no_grad():
        ours, theirs = net(prompts()), model(prompts()).logits
    assert ours.std() > 0.5
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()
    assert written_continuations(model, prompts()[:1]) == greedy(net, prompts()[:1], 12)


@pytest.mark.parametrize("name", OWN)
def test_the_packages_own_model_is_the_net(name: str, tmp_path: Path) -> None:
    import moa_lightning.huggingface  # noqa: F401 - registers it

    gpt, ffn, moe, reason = OWN[name]
    net = net_of(gpt, ffn, moe)
    written = write_hub_folder(net, open_tokenizer("bytes"), tmp_path / "out")
    assert written.architecture == "MoaForCausalLM"
    assert reason in str(written.reason)
    model, told = loaded(tmp_path / "out")
    assert not any(told.values()), told
    assert model.get_input_embeddings().weight.shape == (256, 32)
    with torch.no_grad():
        assert torch.equal(model(prompts()).logits, net(prompts()))
        assert written_continuations(model, prompts()[:1]) == greedy(net, prompts()[:1], 12)
        wide, _ = loaded(tmp_path / "out", dtype=torch.float64)
        net = net.double()
        net.cos, net.sin = wide.net.cos, wide.net.sin  # the tables stay float32 in transformers
        difference = (wide(prompts()).logits - net(prompts())).abs().max()
        assert difference < 1e-10
    narrow, _ = loaded(tmp_path / "out", dtype=torch.bfloat16)
    for key, tensor in narrow.net.state_dict().items():
        mixes = key.endswith(("_mix.base", "_mix.gate_weight", "router.weight", "router.bias"))
        assert tensor.dtype == (torch.float32 if mixes else torch.bfloat16), key
    assert narrow(prompts()).logits.isfinite().all()


def test_generation_of_the_packages_own_model(tmp_path: Path) -> None:
    """Padding on the left changes nothing; nor does the cache; beams are reordered; a saved copy is the same."""
    from moa_lightning.huggingface import MoaForCausalLM

    gpt, ffn, moe, _ = OWN["moe"]
    write_hub_folder(net_of(gpt, ffn, moe), open_tokenizer("bytes"), tmp_path / "out")
    model = MoaForCausalLM.from_pretrained(tmp_path / "out")
    alone = [written_continuations(model, row[None, start:]) for row, start in zip(prompts(), (0, 5, 17), strict=True)]
    padded, mask = prompts(), torch.ones(3, 20, dtype=torch.int64)
    for row, start in enumerate((0, 5, 17)):
        padded[row, :start], mask[row, :start] = 0, 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 999, "pad_token_id": 0}
    for cached in (True, False):
        found = model.generate(padded, attention_mask=mask, use_cache=cached, **options)
        assert found[:, 20:].tolist() == alone
    beams = [model.generate(prompts()[:1], num_beams=3, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*beams)
    labels = torch.where(mask == 1, padded, -100)
    logits = model(padded, attention_mask=mask).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:])
    assert torch.allclose(model(padded, attention_mask=mask, labels=labels).loss, expected)
    model.save_pretrained(tmp_path / "again")
    again = MoaForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(prompts()).logits, model(prompts()).logits)
    for bad in ({"output_attentions": True}, {"attention_mask": mask[:, None, None]}):
        with pytest.raises(ValueError, match="attention"):
            model(padded, **bad)


def test_the_folder_names_the_package_where_none_of_it_is_imported(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    net = net_of(*OWN["la"][:3])
    write_hub_folder(net, open_tokenizer("bytes"), tmp_path / "out")
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**content, "model_type": "unheard_of"}))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(prompts()).logits, net(prompts()))
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "moa_lightning.huggingface")
    with pytest.raises(ImportError, match=r"pip install 'moa-lightning\[hf\]'"):
        import moa_lightning.huggingface  # noqa: F401


TEXTS = ["plain", "", " two  spaces\n\ttab", "é → 漢字 🙂 Ā ā", "a\0b", "x <|end", "\x7f\x80\xad\xff"]


def test_the_tokenizers_are_ours(tmp_path: Path) -> None:
    (tmp_path / "bpe.json").write_text(train_bpe(["some words and é → 漢字, some more"] * 9, 280).to_str())
    content = json.loads((tmp_path / "bpe.json").read_text())
    template = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    added = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    wrapping = {"type": "TemplateProcessing", "single": added, "pair": added, "special_tokens": special}
    content["post_processor"] = {"type": "Sequence", "processors": [template, wrapping]}
    (tmp_path / "wrapping.json").write_text(json.dumps(content))
    for number, name in enumerate(("bytes", str(tmp_path / "bpe.json"), str(tmp_path / "wrapping.json"))):
        ours = open_tokenizer(name)
        for architecture in ("qwen3", "llama", "apertus", "la"):
            out = tmp_path / f"{number}-{architecture}"
            _, gpt, ffn, moe = STOCK.get(architecture) or ("", *OWN["la"][:3])
            write_hub_folder(net_of(gpt, ffn, moe), ours, out)
            theirs = transformers.AutoTokenizer.from_pretrained(out)
            for text in TEXTS:
                (expected,) = ours.encode([text.encode()])
                assert theirs(text)["input_ids"] == expected.tolist(), (name, architecture, text)
                assert theirs.decode(expected.tolist()) == text
            assert theirs.eos_token_id == theirs.pad_token_id == ours.separator
            assert theirs.model_max_length == CONTEXT
            batch = theirs(["ab", "c"], padding=True)
            assert batch["attention_mask"] == [[1, 1], [0, 1]]
