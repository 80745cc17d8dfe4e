"""A classifier of images for transformers, whose blocks are those of a TokenFormer or of a Transformer."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import initialization
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple

from .configuration_tokenformer_image import TokenFormerImageConfig
from .network_tokenformer_image import ImageNetwork, Patches
from .pattention_tokenformer import TokenBank


class TokenFormerForImageClassification(PreTrainedModel):
    """Pixels, as the image processor of the same folder gives them, to logits of the classes."""

    config_class = TokenFormerImageConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _no_split_modules = ["Patches", "ImageLayer"]
    _supports_sdpa = True

    def __init__(self, config: TokenFormerImageConfig):
        super().__init__(config)
        self.model = ImageNetwork(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        tensors: tuple[Tensor | None, ...] = ()
        if isinstance(module, Patches):
            tensors = (module.positions, module.class_token)
        elif isinstance(module, TokenBank):
            tensors = (module.keys, module.values, module.router)
            initialization.zeros_(module.balance)
        for tensor in tensors:
            if tensor is not None:
                initialization.normal_(tensor, std=self.config.initializer_range)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> ImageClassifierOutput:
        """`labels`: [batch], the numbers of the classes."""
        hidden_states = self.model(pixel_values)
        logits = self.head(self.model.pool(hidden_states))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss=loss, logits=logits)
