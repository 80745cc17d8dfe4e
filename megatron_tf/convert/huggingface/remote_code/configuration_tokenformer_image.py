"""The configuration of a classifier of images for transformers."""

from __future__ import annotations

from transformers import PretrainedConfig

from .pattention_tokenformer import PROJECTIONS

BLOCK_TYPES = ("tokenformer", "transformer")
IMAGE = ("size", "patch", "channels", "classes", "pooling", "mean", "std", "crop")


class TokenFormerImageConfig(PretrainedConfig):
    """`image`: {"size": pixels, "patch": pixels, "channels": 1 or 3, "classes": n, "pooling": "class_token" or "mean",
    "mean": [...], "std": [...], "crop": share}; what the processor needs of it is in preprocessor_config.json again.
    `block_type`: tokenformer or transformer.

    Of a TokenFormer `parameter_tokens`, `scales`, `sparse` and `activation` are as in the language model:
    `parameter_tokens`: number of parameter tokens of the projections, {"qkv": n, "proj": n, "ffn": n}.
    `scales`: of each layer, τ of its projections. A model that was grown may hold another τ than the √n of a fresh one.
    Of a Transformer `intermediate_size` is the width of its MLP, and `num_key_value_heads` counts heads of keys.
    """

    model_type = "tokenformer_image"
    has_no_defaults_at_init = True  # a saved configuration holds every value

    def __init__(
        self,
        image=None,
        block_type="tokenformer",
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        layer_norm_eps=1e-6,
        initializer_range=0.02,
        parameter_tokens=None,
        scales=None,
        sparse=None,
        activation="l2_norm_gelu",
        intermediate_size=None,
        num_key_value_heads=None,
        **kwargs,
    ):
        if block_type not in BLOCK_TYPES:
            raise ValueError(f"block_type is {block_type!r}, expected one of {', '.join(BLOCK_TYPES)}")
        if not isinstance(image, dict) or set(image) != set(IMAGE):
            raise ValueError(f"image is {image!r}, expected its {', '.join(IMAGE)}")
        layers = [set(layer) for layer in scales or ()]
        if block_type == "tokenformer" and layers != [set(PROJECTIONS)] * num_hidden_layers:
            raise ValueError(f"scales must hold, for each of {num_hidden_layers} layers, τ of {', '.join(PROJECTIONS)}")
        self.block_type = block_type
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.parameter_tokens = parameter_tokens
        self.scales = scales
        self.sparse = sparse
        self.activation = activation
        self.intermediate_size = intermediate_size
        self.num_key_value_heads = num_key_value_heads
        if not {"num_labels", "id2label"} & set(kwargs):
            kwargs["num_labels"] = image["classes"]
        super().__init__(**kwargs)
        # num_labels may ask for a head with another number of classes
        self.image = {**image, "classes": self.num_labels}
