"""An export in transformers by either norm: a prompt and one more token, against a Llama of as many parameters.

Random weights. Models are cut to a few layers, and their vocabulary in proportion. The norm "gram" is what a user asks
for when an export is loaded.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_tf.benchmark.models import equal_transformer
from megatron_tf.benchmark.report import Row
from megatron_tf.benchmark.timing import Call, interleaved
from megatron_tf.config.sections.model import Model
from megatron_tf.convert.huggingface.configuration import CODE, huggingface_config
from megatron_tf.convert.huggingface.export import CONFIG_NAME, write_code, write_json
from megatron_tf.convert.huggingface.verify import verifying_versions
from megatron_tf.state.parameters import initial_scales
from megatron_tf.tasks.language_model.section import vocab_size_of


def rows(
    model: Model, device: torch.device, dtype: torch.dtype, layers: int, positions: int, rounds: int
) -> Iterator[Row]:
    """Of a prompt of so many positions, and of one token after it, with `layers` layers of each model."""
    depth = min(layers, model.num_layers)
    sizes = {"num_layers": depth, "vocab_size": math.ceil(vocab_size_of(model) * depth / model.num_layers)}
    models = {**exported(model.model_copy(update=sizes)), "llama": llama(model, **sizes)}
    ids = torch.randint(sizes["vocab_size"], (1, positions), device=device)
    prompts: dict[str, Call] = {}
    tokens: dict[str, Call] = {}
    for name, made in models.items():
        made.to(device, dtype).eval()
        prompts[name], tokens[name] = calls(made, ids)
    with torch.inference_mode():
        for what, timed in (("prompt", prompts), ("one token", tokens)):
            timings = interleaved(timed, device, rounds)
            yield {
                "call": what,
                "positions": positions,
                "layers": depth,
                **{f"{name} ms": 1e3 * timing.median for name, timing in timings.items()},
                "gram × direct": timings["gram"].speed_against(timings["direct"]),
                "direct × llama": timings["direct"].speed_against(timings["llama"]),
                "gram × llama": timings["gram"].speed_against(timings["llama"]),
                "parameters": models["direct"].num_parameters(),
                "llama's": models["llama"].num_parameters(),
            }


def exported(model: Model) -> dict[str, Any]:
    """The model of transformers that an export of `model` is, by its norm."""
    import transformers

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / CONFIG_NAME, huggingface_config(model, initial_scales(model), None))
        write_code(folder, CODE, verifying_versions(), "export a model")
        found = {}
        for norm in ("direct", "gram"):
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, norm=norm)
            found[norm] = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
        return found


def llama(model: Model, num_layers: int, vocab_size: int) -> Any:
    """A Llama of as many parameters a layer, whose gated MLP has three matrices of two thirds the width."""
    import transformers

    equal = equal_transformer(model)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=equal.hidden_size,
        intermediate_size=2 * equal.ffn_hidden_size // 3,
        num_hidden_layers=num_layers,
        num_attention_heads=equal.num_attention_heads,
        num_key_value_heads=equal.num_attention_heads,
        max_position_embeddings=model.seq_length,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def calls(model: Any, ids: torch.Tensor) -> tuple[Call, Call]:
    """(the prompt, one token after it); the cache is as before when the token is done."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    name = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
    with torch.inference_mode():
        cache = getattr(model(ids, use_cache=True, logits_to_keep=1), name)

    def token() -> None:
        model(ids[:, -1:], use_cache=True, **{name: cache})
        cache.crop(-1)

    return lambda: model(ids, use_cache=True, logits_to_keep=1), token
