"""The configuration of a TokenFormer for transformers."""

from __future__ import annotations

from transformers import PretrainedConfig

from .pattention_tokenformer import PROJECTIONS, check_norm

BANK = ("group_size", "candidates", "dense")
ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


class TokenFormerConfig(PretrainedConfig):
    """`parameter_tokens`: number of parameter tokens of the projections, {"qkv": n, "proj": n, "ffn": n}.

    `sparse`: of the kinds of projection whose positions choose among more tokens than these, {"ffn": {"group_size": g,
    "candidates": m, "dense": n}}. All tokens but n lie in slots of g, with m candidates each. None: no projection has
    any.
    `scales`: of each layer, τ of its projections, {"q_proj": τ, "k_proj": τ, "v_proj": τ, "o_proj": τ, "mlp": τ}.
    A model that was grown may hold another τ than the √n of a fresh one, so τ never follows from anything else here.
    `activation`: how scores over the parameter tokens become weights: l2_norm_gelu, gelu_l2_norm or softmax.
    `norm`: how l2_norm_gelu finds the norm of scores: "direct", of the scores, or "gram", of KᵀK, see `Pattention`. The
    latter is for weights that stay as they are.
    `rotary_fraction`: share of each head's channels that is rotated.
    """

    model_type = "tokenformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    has_no_defaults_at_init = True  # a saved configuration holds every value
    # A Pattention's direct norm needs the scores of all tokens, so keys and values cannot simply be split column- and
    # rowwise (with the norm "gram" those of the feed-forward are). Query, key and value: every rank has all scores, and
    # outputs are split by heads. Output projection: the input is split by heads, and scores are summed over the ranks.
    # Feed-forward: tokens are split, scores gathered for the norm and split again. A bank is whole on every rank.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj.values": "colwise",
        "layers.*.self_attn.k_proj.values": "colwise",
        "layers.*.self_attn.v_proj.values": "colwise",
        "layers.*.self_attn.o_proj.keys": "rowwise",
        "layers.*.mlp.keys": "colwise_gather_output",
        "layers.*.mlp.values": "rowwise_split_input",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        vocab_size=50304,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=2048,
        parameter_tokens=None,
        scales=None,
        sparse=None,
        activation="l2_norm_gelu",
        norm="direct",
        rotary_fraction=0.25,
        rotary_base=10000.0,
        layer_norm_eps=1e-5,
        initializer_range=0.02,
        use_cache=True,
        tie_word_embeddings=True,
        **kwargs,
    ):
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
        check_norm(norm)
        if not isinstance(parameter_tokens, dict) or set(parameter_tokens) != set(PROJECTIONS.values()):
            raise ValueError(
                f"parameter_tokens is {parameter_tokens!r}, expected the numbers of qkv, proj and ffn tokens"
            )
        sizes = list(sparse.values()) if isinstance(sparse, dict) and set(sparse) <= set(parameter_tokens) else [None]
        if sparse is not None and not all(isinstance(size, dict) and set(size) == set(BANK) for size in sizes):
            raise ValueError(
                f"sparse is {sparse!r}, expected {', '.join(BANK)} of projections that choose among tokens"
            )
        if not isinstance(scales, list) or [set(layer) for layer in scales] != [set(PROJECTIONS)] * num_hidden_layers:
            raise ValueError(f"scales must hold, for each of {num_hidden_layers} layers, τ of {', '.join(PROJECTIONS)}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.parameter_tokens = parameter_tokens
        self.sparse = sparse
        self.scales = scales
        self.activation = activation
        self.norm = norm
        self.rotary_fraction = rotary_fraction
        self.rotary_base = rotary_base
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
