"""A language model as a folder that transformers loads, and with it whatever builds on transformers.

Where a stock architecture computes what the net computes, the folder holds that one and no code of ours is needed:

    query-key norm   feed-forward        stock architecture
    yes              gated, no bias      Qwen3
    yes              plain, no bias      Apertus
    no               gated               Llama
    no               plain               Arcee
    yes              experts, gated      Qwen3-MoE (tokens choose, no bias, none shared)

Fixed activations only, of those that transformers knows. Everything else becomes MoaForCausalLM (huggingface.py), which
needs this package where it is loaded. Transformers itself is not needed to write either; the folder is written under
another name and renamed when all of it is there.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import is_pointwise
from ..checkpoints import PARTIAL, remove
from ..errors import UserError
from ..models.gpt import GPT

SHIM = "modeling_moa.py"
OURS = "MoaForCausalLM"
WEIGHTS = "model.safetensors"
# our names -> those of transformers' ACT2FN; gelu is the exact one in both
_ACTIVATIONS = {
    "identity": "linear",
    **{name: name for name in ("gelu", "silu", "relu", "leaky_relu", "relu2", "tanh")},
}
_SHIM_TEXT = '''"""The package moa-lightning must be installed; with it this model loads by trust_remote_code=True."""

from moa_lightning.huggingface import MoaConfig, MoaForCausalLM  # noqa: F401
'''


class Stock(NamedTuple):
    """A stock architecture and how it names what differs among them."""

    architecture: str
    model_type: str
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


class Written(NamedTuple):
    """What an export has written."""

    architecture: str
    reason: str | None
    """why it is no stock architecture"""
    tensors: int
    bytes: int


def stock_architecture(net: GPT) -> Stock | str:
    """The stock architecture that computes what the net computes, or why there is none."""
    gpt, ffn, moe = net.config, net.ffn, net.moe
    if ffn.mixing != "fixed":
        return f"no stock architecture mixes activations (ffn.mixing {ffn.mixing})"
    for place in ("attention_gate", "pointwise_norm"):
        if getattr(ffn, place) != "none":
            return f"no stock architecture has the layer that ffn.{place} adds"
    if not is_pointwise(ffn.activation) or ffn.activation not in _ACTIVATIONS:
        return f"no stock architecture has the activation {ffn.activation}"
    if moe.experts:
        simple = moe.router == "token_choice" and moe.balance != "bias" and not moe.shared_experts
        if not (gpt.qk_norm and ffn.gated and simple) or ffn.bias:
            return "no stock architecture has these experts (Qwen3-MoE: gated, no bias, tokens choose, none shared)"
        return Stock("Qwen3MoeForCausalLM", "qwen3_moe")
    if gpt.qk_norm and ffn.bias:
        return "no stock architecture has both query-key norm and biases in the feed-forward layer"
    if ffn.gated:
        return Stock("Qwen3ForCausalLM", "qwen3") if gpt.qk_norm else Stock("LlamaForCausalLM", "llama")
    if gpt.qk_norm:
        return Stock("ApertusForCausalLM", "apertus", ("attention_layernorm", "feedforward_layernorm"))
    return Stock("ArceeForCausalLM", "arcee")


def write_hub_folder(net: GPT, tokenizer: Any, out: Path) -> Written:
    """Write config.json, model.safetensors and the tokenizer's files.

    Args:
        net: the model, whole and on the CPU.
        tokenizer: what turned text into its tokens (data.tokenizer.Tokenizer).
        out: the folder; what is there already must be nothing, or an empty one.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    stock = stock_architecture(net)
    config = _own_config(net) if isinstance(stock, str) else _stock_config(net, stock)
    tensors = _own_tensors(net) if isinstance(stock, str) else _stock_tensors(net, stock)
    files = {
        "config.json": {**config, **_common(net, tokenizer.separator)},
        "tokenizer.json": tokenizer.as_json(),
        "tokenizer_config.json": _tokenizer_config(net, tokenizer),
    }
    partial = out.with_name(out.name + PARTIAL)
    try:
        remove(partial)
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if isinstance(stock, str):
            (partial / SHIM).write_text(_SHIM_TEXT)
        save_file({name: _own_memory(tensor) for name, tensor in tensors.items()}, partial / WEIGHTS, {"format": "pt"})
        size = sum(file.stat().st_size for file in partial.iterdir())
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"'{out}' cannot be written ({error}); choose another --out") from error
    if isinstance(stock, str):
        return Written(OURS, stock, len(tensors), size)
    return Written(stock.architecture, None, len(tensors), size)


def _own_memory(tensor: Tensor) -> Tensor:
    """A copy where the tensor is a part of another one, which safetensors refuses."""
    return tensor.detach().contiguous().clone()


def _common(net: GPT, end: int) -> dict[str, Any]:
    return {
        "vocab_size": net.embed.num_embeddings,
        "max_position_embeddings": net.context_length,
        "tie_word_embeddings": net.config.tie_embeddings,
        "torch_dtype": str(net.embed.weight.dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def _own_config(net: GPT) -> dict[str, Any]:
    ffn = replace(net.ffn, start_from=None)  # the weights are here
    return {
        "architectures": [OURS],
        "model_type": "moa_gpt",
        "auto_map": {"AutoConfig": "modeling_moa.MoaConfig", "AutoModelForCausalLM": f"modeling_moa.{OURS}"},
        "gpt": asdict(net.config),
        "ffn": ffn.as_dict(),
        "moe": asdict(net.moe),
    }


def _own_tensors(net: GPT) -> dict[str, Tensor]:
    dropped = "head.weight" if net.config.tie_embeddings else None
    return {f"net.{name}": tensor for name, tensor in net.state_dict().items() if name != dropped}


def _stock_config(net: GPT, stock: Stock) -> dict[str, Any]:
    gpt, moe = net.config, net.moe
    up_proj = net.state_dict()[f"blocks.0.mlp.{'experts.' if moe.experts else ''}up_proj.weight"]
    config = {
        "architectures": [stock.architecture],
        "model_type": stock.model_type,
        "hidden_size": gpt.dim,
        "intermediate_size": up_proj.shape[-2],
        "num_hidden_layers": gpt.depth,
        "num_attention_heads": gpt.num_heads,
        "num_key_value_heads": gpt.kv_heads,
        "head_dim": gpt.head_dim,
        "hidden_act": _ACTIVATIONS[net.ffn.activation],
        "rms_norm_eps": torch.finfo(torch.float32).eps,  # what nn.RMSNorm takes by itself
        "attention_bias": False,
        "mlp_bias": net.ffn.bias,
        # before transformers 5, and since
        "rope_theta": gpt.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": gpt.rope_theta},
    }
    if moe.experts:
        config |= {
            "moe_intermediate_size": up_proj.shape[-2],
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.top_k > 1,
            "router_aux_loss_coef": moe.balance_loss_weight,
        }
    return config


def _stock_tensors(net: GPT, stock: Stock) -> dict[str, Tensor]:
    """The net's tensors under the names that these architectures share."""
    gpt, state = net.config, net.state_dict()
    renamed = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if not gpt.tie_embeddings:
        renamed["head.weight"] = "lm_head.weight"
    tensors = {theirs: state[ours] for ours, theirs in renamed.items()}
    widths = [gpt.num_heads * gpt.head_dim, *[gpt.kv_heads * gpt.head_dim] * 2]
    for index in range(gpt.depth):
        block, layer = f"blocks.{index}.", f"model.layers.{index}."
        own = {name.removeprefix(block): tensor for name, tensor in state.items() if name.startswith(block)}
        for norm, name in zip(("norm1", "norm2"), stock.norms, strict=True):
            tensors[f"{layer}{name}.weight"] = own.pop(f"{norm}.weight")
        for name, part in zip("qkv", own.pop("attn.qkv.weight").split(widths), strict=True):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = part
        tensors[f"{layer}self_attn.o_proj.weight"] = own.pop("attn.proj.weight")
        for name, tensor in own.items():
            tensors |= _layer_tensors(layer, name, tensor)
    return tensors


def _layer_tensors(layer: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A query-key norm, or a part of the feed-forward layer: stacked experts one by one."""
    part, _, rest = name.partition(".")
    if part == "attn":
        return {f"{layer}self_attn.{rest}": tensor}
    if rest == "router.weight":
        return {f"{layer}mlp.gate.weight": tensor}
    if rest.startswith("experts."):
        leaf = rest.removeprefix("experts.")
        return {f"{layer}mlp.experts.{number}.{leaf}": expert for number, expert in enumerate(tensor)}
    return {f"{layer}mlp.{rest}": tensor}


def _tokenizer_config(net: GPT, tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": net.context_length,
        "eos_token": tokenizer.separator_name,
        "pad_token": tokenizer.separator_name,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
