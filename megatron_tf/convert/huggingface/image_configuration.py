"""The contents of config.json and preprocessor_config.json of an exported image classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_tf.config.sections.model import Model
from megatron_tf.convert.huggingface.configuration import IMAGE_KEYS, IMAGE_MODEL_TYPE, scales_by_layer, under_keys
from megatron_tf.tasks.image_classification.section import image_of

CONFIGURATION_CODE = "configuration_tokenformer_image.py"
MODELING_CODE = "modeling_tokenformer_image.py"
PROCESSING_CODE = "image_processing_tokenformer_image.py"
IMAGE_CODE = (
    CONFIGURATION_CODE,
    MODELING_CODE,
    PROCESSING_CODE,
    "network_tokenformer_image.py",
    "pattention_tokenformer.py",
    "tokenformer_timm.py",
)
_CLASSIFIER, _PROCESSOR = "TokenFormerForImageClassification", "TokenFormerImageProcessor"


def image_config(model: Model, scales: Mapping[str, float], classes: Sequence[str]) -> dict[str, Any]:
    """The content of config.json. `classes`: their names, in the order of the logits."""
    return {
        "architectures": [_CLASSIFIER],
        "auto_map": {
            "AutoConfig": _name(CONFIGURATION_CODE, "TokenFormerImageConfig"),
            "AutoModelForImageClassification": _name(MODELING_CODE, _CLASSIFIER),
        },
        "model_type": IMAGE_MODEL_TYPE,
        "dtype": "float32",
        "id2label": {str(number): name for number, name in enumerate(classes)},
        "label2id": {name: number for number, name in enumerate(classes)},
        **under_keys(model, IMAGE_KEYS),
        **scales_by_layer(model, scales),
    }


def processor_config(model: Model) -> dict[str, Any]:
    """The content of preprocessor_config.json: how an evaluation resizes, crops and normalises an image."""
    image = image_of(model)
    return {
        "auto_map": {"AutoImageProcessor": _name(PROCESSING_CODE, _PROCESSOR)},
        "image_processor_type": _PROCESSOR,
        "size": image.size,
        "crop": image.crop,
        "channels": image.channels,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def _name(code: str, name: str) -> str:
    return f"{code.removesuffix('.py')}.{name}"
