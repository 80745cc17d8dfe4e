"""A TokenFormer for transformers: a decoder whose projections attend to learnable parameter tokens.

Hidden states are [batch, sequence, hidden].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tokenformer import TokenFormerConfig
from .pattention_tokenformer import Pattention, TokenBank

# The name of the cache in functions and outputs of transformers, which changed in version 5.24.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Keywords that are passed on to the attention function and the loss, or that transformers handles on the way.
KEYWORDS = frozenset(TransformersKwargs.__annotations__) | {
    "shift_labels", "return_dict",
    # continuous batching finds its cache by these
    "logits_indices", "logits_processor_args", "read_index", "write_index", "block_table", "max_seqlen_q",
    "max_seqlen_k",
    # of vLLM and SGLang, which have caches of their own
    "attention_instances", "forward_batch",
}  # fmt: skip
# Keywords of samples packed without padding. All attention functions but one find the samples by their positions.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

MLP_PLAN = {"layers.*.mlp.keys": "colwise", "layers.*.mlp.values": "rowwise"}  # as for an ordinary MLP


def take_cache(past_key_values: Cache | None, cache: Cache | None, keywords: dict[str, object]) -> Cache | None:
    """The cache, which may be given by either name.

    Before 5.24 the cache of continuous batching is a keyword of the attention function, and goes there in `keywords`.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError("cache and past_key_values are two names of one thing: give one of them")
    given = past_key_values if cache is None else cache
    if given is None or isinstance(given, Cache):
        return given
    if type(given).__name__ != "PagedAttentionCache":
        raise TypeError(f"the cache is a {type(given).__name__}. Give a Cache of transformers, such as DynamicCache")
    if CACHE == "cache":
        return given
    keywords["cache"] = given
    return None


def check_keywords(keywords: Mapping[str, object], position_ids: Tensor | None) -> None:
    """No cache, mask or position is ignored: what is unknown may be a plain switch at most."""
    words = ("cache", "past", "mask", "pos")
    for name, value in keywords.items():
        if value is None or name in KEYWORDS:
            continue
        if not isinstance(value, (bool, int, float, str)) or any(word in name for word in words):
            raise TypeError(
                f"TokenFormer knows no keyword {name!r}, and its {type(value).__name__} would be ignored. It takes "
                "input_ids or inputs_embeds, attention_mask, position_ids and cache or past_key_values"
            )
    packed = [name for name in PACKED if keywords.get(name) is not None]
    if packed and position_ids is None:
        raise ValueError(f"{packed[0]} says where packed samples begin. Give position_ids too, 0 at each beginning")


def counted_labels(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels [batch, sequence] without those that padding would predict: what it computes depends on the kernel.

    With padding on the left that is the first token of each text, which nothing predicts with padding on the right.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return labels
    padding = attention_mask[:, -labels.shape[1] :] == 0
    return labels.masked_fill(F.pad(padding[:, :-1], (1, 0)).to(labels.device), -100)


def rotary_tables(config: TokenFormerConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, 1, sequence, rotated channels], fp32 whatever the model's type.

    Channel j of a head is paired with j + channels/2; angle = position · base^(−2j/channels).
    """
    channels = int(config.hidden_size // config.num_attention_heads * config.rotary_fraction)
    exponent = torch.arange(0, channels, 2, device=position_ids.device, dtype=torch.float32) / channels
    angles = position_ids[:, None, :, None].float() * (1.0 / config.rotary_base**exponent)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first channels of every head; states [batch, heads, sequence, head channels]."""
    channels = cos.shape[-1]
    turned, kept = states[..., :channels], states[..., channels:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(states.dtype), kept), -1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Plain attention that also gives its weights. The mask is added to the scores."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class TokenFormerAttention(nn.Module):
    """Causal self-attention; its four projections are Pattentions."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.q_proj = Pattention(config, layer_idx, "q_proj")
        self.k_proj = Pattention(config, layer_idx, "k_proj")
        self.v_proj = Pattention(config, layer_idx, "v_proj")
        self.o_proj = Pattention(config, layer_idx, "o_proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        cache = kwargs.pop(CACHE, None)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)  # under tensor parallelism this rank's heads only
        query = apply_rotary(self.q_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        key = apply_rotary(self.k_proj(hidden_states).view(shape).transpose(1, 2), *position_embeddings)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if isinstance(cache, Cache):
            key, value = cache.update(key, value, self.layer_idx)
        elif cache is not None:  # continuous batching, which also changes the attention function's keywords
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        # vLLM reads this source: one call to a local that comes from get_interface is what it replaces by its own.
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(output.reshape(*shape[:-2], -1).contiguous()), weights


class TokenFormerLayer(GradientCheckpointingLayer):
    """x += attention(LN(x)); x += Pattention(LN(x)). The norms have no weight."""

    def __init__(self, config: TokenFormerConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, elementwise_affine=False)
        self.self_attn = TokenFormerAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(
            config.hidden_size, config.layer_norm_eps, elementwise_affine=False
        )
        self.mlp = Pattention(config, layer_idx, "mlp")

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class TokenFormerPreTrainedModel(PreTrainedModel):
    config_class = TokenFormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenFormerLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": TokenFormerLayer, "attentions": TokenFormerAttention}

    def __init__(self, config: TokenFormerConfig, *inputs, **kwargs):
        super().__init__(config, *inputs, **kwargs)
        self._can_compile_fullgraph = config.sparse is None  # sizes of a bank's products depend on its choices

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TokenBank):
            for tokens in (module.keys, module.values, module.router):
                initialization.normal_(tokens, std=self.config.initializer_range)
            initialization.zeros_(module.balance)


class TokenFormerModel(TokenFormerPreTrainedModel):
    """Token ids, or their embeddings, to hidden states after the final norm."""

    def __init__(self, config: TokenFormerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TokenFormerLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()
        mlp = self.layers[0].mlp
        if mlp.norm == "gram" and mlp.bank is None:  # the norm needs no scores, so these stay with their keys
            self._tp_plan = {**(self._tp_plan or {}), **MLP_PLAN}  # type: ignore[unreachable]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        check_keywords(kwargs, position_ids)
        cache = take_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0) + past
        named_cache = {CACHE: cache}
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache,
        )
        hidden_states = inputs_embeds
        position_embeddings = rotary_tables(self.config, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                **named_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **named_cache)


class TokenFormerForCausalLM(TokenFormerPreTrainedModel, GenerationMixin):
    """The language model; its head is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: TokenFormerConfig):
        super().__init__(config)
        self.model = TokenFormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """`labels`: [batch, sequence], the input ids again; -100 is left out of the loss, and what padding predicts."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            labels = counted_labels(labels, attention_mask)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )
