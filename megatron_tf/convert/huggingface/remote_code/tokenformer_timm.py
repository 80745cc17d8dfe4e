"""Makes the classifier of this folder a model of timm:

import sys, timm
sys.path.insert(0, "FOLDER")
import tokenformer_timm
model = timm.create_model("tokenformer_image", pretrained=True)
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

FOLDER = Path(__file__).resolve().parent
if TYPE_CHECKING:
    from .network_tokenformer_image import ImageNetwork
else:
    # The files next to this one import each other relatively. So make a package of their folder, whatever its name.
    sys.modules["tokenformer_export"] = package = ModuleType("tokenformer_export")
    package.__path__ = [str(FOLDER)]
    ImageNetwork = importlib.import_module("tokenformer_export.network_tokenformer_image").ImageNetwork

CONFIG: dict[str, Any] = {"sparse": None, **json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))}
IMAGE: dict[str, Any] = CONFIG["image"]
default_cfgs = {
    "tokenformer_image": {
        "file": str(FOLDER / "model.safetensors"),
        "num_classes": IMAGE["classes"],
        "label_names": list(CONFIG["id2label"].values()),
        "input_size": (IMAGE["channels"], IMAGE["size"], IMAGE["size"]),
        "fixed_input_size": True,
        "crop_pct": IMAGE["crop"],
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": tuple(IMAGE["mean"]),
        "std": tuple(IMAGE["std"]),
        "classifier": "head",
    }
}


class TokenFormerImage(ImageNetwork):
    """Normalised pixels to logits, with the methods that timm's models have."""

    def __init__(self, num_classes: int, in_chans: int, img_size: Any = None, drop_rate: float = 0.0):
        super().__init__(SimpleNamespace(**CONFIG))
        size = IMAGE["size"] if img_size is None else img_size
        if in_chans != IMAGE["channels"] or {*([size] if isinstance(size, int) else size)} != {IMAGE["size"]}:
            raise ValueError(
                f"the model sees {IMAGE['channels']} channels of {IMAGE['size']} pixels squared, and in_chans is "
                f"{in_chans}, img_size {size}"
            )
        self.num_features = self.head_hidden_size = CONFIG["hidden_size"]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head; the pooling stays as it was trained."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.head

    def no_weight_decay(self) -> set[str]:
        return {"patches.positions", "patches.class_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patches", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = self.head_drop(self.pool(x))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def own_names(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of the file, which are those of transformers, under timm's names."""
    return {name.removeprefix("model."): weight for name, weight in weights.items()}


@register_model
def tokenformer_image(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(
        TokenFormerImage, "tokenformer_image", pretrained, pretrained_filter_fn=own_names, **kwargs
    )
