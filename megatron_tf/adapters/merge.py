"""Merging appended tokens into a TokenFormer: keys and values of each projection are concatenated, and τ is kept.

The forward pass with the adapter equals that of the merged model, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_tf.adapters.folder import Adapter, is_appended, read_adapter
from megatron_tf.adapters.loading import load_adapted, load_base, random_ids
from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS
from megatron_tf.architectures.tokenformer.section import as_tokenformer
from megatron_tf.config.load import read_model
from megatron_tf.config.sections.model import Model
from megatron_tf.convert.agreement import Agreement, agreement
from megatron_tf.convert.huggingface.choices import Choices
from megatron_tf.convert.huggingface.export import ExportedTokenizer, write_export
from megatron_tf.convert.huggingface.importing import HuggingFaceModel, open_export
from megatron_tf.errors import CheckpointError
from megatron_tf.inference.load import configured_tokenizer, known_eod, open_tokenizer
from megatron_tf.model.tokenformer import TokenFormer

_LAYERS = "model.layers."
_COPIED = ("chat_template*",)  # an export has none, but the user may have added one


def merge_adapter(base: Path, adapter: Path, target: Path) -> dict[str, Agreement]:
    """Write the merged model as an exported folder `target`; returns the agreement on each kind of sample.

    The model is compared with base and adapter before it is written, and loaded by transformers before the folder gets
    its name. CheckpointError, with nothing left behind, when a comparison fails or the adapter's tokens are not
    appended ones; ArgumentError when the adapter is of another base.
    """
    stored = read_adapter(adapter)
    if not is_appended(stored.config):
        raise CheckpointError(
            f"{adapter}: its branches have a norm of their own, so no weights of the base are equal to them. Keep "
            "base and adapter as two folders, or train one that appends tokens: adapter.modules [pattention]"
        )
    adapted = load_adapted(load_base(base), {"default": adapter})
    network = merged_network(open_export(base), stored)
    name, tokenizer = configured_tokenizer(base), None
    if name is not None:
        opened = open_tokenizer(name, network.config, known_eod(base, name), remedy="put the right one there")
        tokenizer = ExportedTokenizer(opened, Path(name))
    found = {"base and adapter": compare(adapted, network)}
    if not found["base and adapter"].holds:
        raise CheckpointError(
            f"the merged model computes another function than base and adapter: {found['base and adapter']}. Nothing "
            "was written. Please report this, with the adapter's adapter_config.json"
        )
    del adapted
    return found | write_export(target, network, tokenizer, [file for end in _COPIED for file in base.glob(end)])


def merged_network(export: HuggingFaceModel, adapter: Adapter) -> TokenFormer:
    """The TokenFormer with the adapter's tokens behind its own, fp32."""
    weights = dict(export.weights)
    for module, branch in adapter.branches.items():
        name = _projection(module)
        for leaf, tokens in (("key_tokens", branch.keys), ("value_tokens", branch.values)):
            weights[f"{name}.{leaf}"] = torch.cat([weights[f"{name}.{leaf}"].float(), tokens.float()])
    with torch.device("meta"):
        network = TokenFormer(_merged_model(export.model, adapter), export.scales)
    network.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return network.eval()


@torch.no_grad()
def compare(adapted: torch.nn.Module, network: TokenFormer) -> Agreement:
    """Agreement of logits on random tokens. `network` takes the recorded choices of `adapted`, because rounding could
    decide between candidates."""
    ids, choices = random_ids(adapted), Choices(adapted)
    with choices.recorded():
        expected = adapted(input_ids=ids).logits
    with choices.replayed(network, len(ids)):
        return agreement(network(ids), expected)


def _merged_model(model: Model, adapter: Adapter) -> Model:
    """The model section, with as many more tokens of each kind as the adapter appends to it."""
    count = adapter.config["num_tokens"]
    kinds = {PROJECTIONS[_projection(module).split(".", 2)[2]].tokens for module in adapter.branches}
    values = as_tokenformer(model).model_dump(exclude_none=True)
    for kind in kinds:
        values["parameter_tokens"][kind] += count
        if kind in values.get("sparse", {}):
            values["sparse"][kind]["dense"] += count
    return read_model(values)


def _projection(module: str) -> str:
    """ "model.layers.0.self_attn.q_proj" -> "blocks.0.attention.query"."""
    layer, _, rest = module.removeprefix(_LAYERS).partition(".")
    names: Mapping[str, str] = {names.huggingface: name for name, names in PROJECTIONS.items()}
    return f"blocks.{layer}.{names[rest]}"
