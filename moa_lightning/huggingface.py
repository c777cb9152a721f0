"""Our GPT as a model of the package transformers: importing this module teaches its Auto classes the type "moa_gpt".

    import moa_lightning.huggingface
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)     # written by moa export --to hf

The net is models.gpt.GPT itself, so what it computes is what was trained; keys and values live in transformers' own
cache, which makes beam search and assisted generation work. Padding on the left is masked. Positions are always counted
from the first column: rotary attention depends on differences of positions only, so padding does not change it.
"""

from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
    from transformers.configuration_utils import PretrainedConfig
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        "moa_lightning.huggingface needs the package transformers: pip install 'moa-lightning[hf]'"
    ) from error

from .feedforward import FFNConfig
from .mixing import MixCoefficients
from .models.gpt import GPT
from .models.trunk import Cache, GPTConfig, LayerCache, rotary_table
from .moe import MoEConfig, Router

MODEL_TYPE = "moa_gpt"


class MoaConfig(PretrainedConfig):
    """What a GPT of ours is made of.

    Args:
        gpt, ffn, moe: the fields of GPTConfig, FFNConfig, MoEConfig.
        vocab_size: number of token ids.
        max_position_embeddings: longest input in tokens.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        gpt: dict[str, Any] | None = None,
        ffn: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        vocab_size: int = 256,
        max_position_embeddings: int = 256,
        **kwargs: Any,
    ) -> None:
        self.gpt, self.ffn, self.moe = gpt or {}, ffn or {}, moe or {}
        size = GPTConfig(**self.gpt)
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.num_hidden_layers, self.head_dim = size.dim, size.depth, size.head_dim
        self.num_attention_heads, self.num_key_value_heads = size.num_heads, size.kv_heads
        if self.moe.get("experts") and self.moe.get("router") == "expert_choice":
            kwargs["use_cache"] = False  # a further token changes what those before it get
        super().__init__(**{**kwargs, "tie_word_embeddings": size.tie_embeddings})


class MoaForCausalLM(PreTrainedModel, GenerationMixin):
    """GPT behind transformers' interface; int64 input_ids (B, T) -> logits (B, T, vocab_size).

    Attributes:
        net: the GPT.
    """

    config_class = MoaConfig
    _no_split_modules = ["Block", "MoEBlock"]  # noqa: RUF012 - transformers' own way to say it
    _tied_weights_keys = {"net.head.weight": "net.embed.weight"}  # noqa: RUF012

    def __init__(self, config: MoaConfig) -> None:
        super().__init__(config)
        sizes = config.vocab_size, config.max_position_embeddings
        self.net = GPT(GPTConfig(**config.gpt), FFNConfig(**config.ffn), *sizes, moe=MoEConfig(**config.moe))
        exact = [name for name, part in self.net.named_modules() if isinstance(part, MixCoefficients | Router)]
        self._keep_in_fp32_modules_strict = sorted({name.rpartition(".")[2] for name in exact})  # also in bfloat16
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT draws its own weights; what transformers cannot read from a file are the tables of angles."""
        if isinstance(module, GPT):
            tables = rotary_table(module.context_length, module.config.head_dim, module.config.rope_theta)
            module.cos, module.sin = (table.to(module.cos) for table in tables)

    def get_input_embeddings(self) -> nn.Module:
        return self.net.embed

    def set_input_embeddings(self, value: Any) -> None:
        self.net.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.net.head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.net.head = new_embeddings

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; without a cache where experts choose tokens and so must see a text whole."""
        if self.net.chooses_from_sequences:
            kwargs.setdefault("use_cache", False)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of further tokens.

        Args:
            input_ids: (B, T), after the tokens that the cache has.
            attention_mask: (B, tokens in the cache + T), 0 for padding.
            past_key_values: transformers' cache of a growing kind.
            labels: (B, T), -100 where they do not count; gives the mean loss of predicting each from those before.
            use_cache: make a cache where none is given; None: as the config says, never in training.
            logits_to_keep: compute the logits of so many tokens at the end only; 0: of all.
            kwargs: what transformers' generation passes besides, position_ids among it; none of it is looked at.

        Raises:
            ValueError: another kind of cache or mask, hidden states or attention weights are asked for; padding for
                experts that choose tokens.
            UserError: such experts are given a cache.
        """
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("this model reads growing caches only: leave cache_implementation out")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} axes; give (batch, tokens), 0 for padding")
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("this model gives no hidden states and no attention weights")
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True)) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        if labels is not None and logits_to_keep:
            raise ValueError("labels need all logits: leave logits_to_keep out")
        real = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        if real is not None and self.net.chooses_from_sequences:
            raise ValueError("experts that choose tokens would choose padding: give texts of one length")
        cache = _Cache(self.net.config.depth, past_key_values, real)
        logits = self.net(input_ids, cache, last=logits_to_keep or None)
        loss = None
        if labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=count)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)


class _Layer(LayerCache):
    """One block's keys and values in transformers' cache, or nowhere, and the mask of padding."""

    def __init__(self, index: int, store: Any, real: Tensor | None) -> None:
        self.index, self.store, self.real = index, store, real

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return (keys, values) if self.store is None else self.store.update(keys, values, self.index)

    def mask(self, length: int, keys: Tensor) -> Tensor | None:
        if self.real is None:
            return super().mask(length, keys)
        kept = keys.shape[2]
        places = torch.arange(kept, device=keys.device)
        query = places[kept - length :, None]
        seen = (places <= query) & self.real[:, None, :kept]  # (B, length, kept)
        # padding sees itself: for a row without any key some attention kernels give NaN
        return (seen | (places == query))[:, None]


class _Cache(Cache):
    """GPT's cache over transformers': `store` is None where nothing is kept; real (B, tokens) is False for padding."""

    def __init__(self, depth: int, store: Any, real: Tensor | None) -> None:
        self.layers, self.store = [_Layer(index, store, real) for index in range(depth)], store

    @property
    def length(self) -> int:
        return 0 if self.store is None else int(self.store.get_seq_length())


AutoConfig.register(MODEL_TYPE, MoaConfig, exist_ok=True)
AutoModelForCausalLM.register(MoaConfig, MoaForCausalLM, exist_ok=True)
