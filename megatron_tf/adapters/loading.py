"""Loading a base model of transformers, with adapters on it, from folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_tf.adapters.folder import read_adapter
from megatron_tf.adapters.summary import adapter_folder
from megatron_tf.caches import prepare_hugging_face
from megatron_tf.checkpoint.kinds import holds_run
from megatron_tf.checkpoint.strict_json import NotJsonError, parse_json
from megatron_tf.convert.huggingface.configuration import IMAGE_MODEL_TYPE, MODEL_TYPE
from megatron_tf.convert.huggingface.verify import require_transformers
from megatron_tf.durable import read_plain
from megatron_tf.errors import CheckpointError, DataError, UserError, file_errors, first_line
from megatron_tf.requirements import is_wanted, wanted_versions

_CONFIG = "config.json"
_VOCABULARIES = ("tokenizer.*", "vocab.*", "spiece.model")  # a tokenizer needs one of these
_LARGEST_CONFIG = 2**24
_SAMPLE = 32  # tokens: a logit depends on all tokens before it


def require_peft() -> str:
    """The version of PEFT. UserError when PEFT or transformers is missing or has an unsupported version."""
    require_transformers()
    wanted = f"peft{wanted_versions('peft')}"
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        raise UserError(f"peft is not installed, and adapters are a method of it: pip install '{wanted}'") from None
    if not is_wanted("peft", version):
        raise UserError(f"peft is {version}, and adapters need another: pip install '{wanted}'")
    return version


def load_base(folder: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """The causal language model in a folder, in evaluation mode. `dtype` "auto": that of its weights. CheckpointError
    when the folder is not that of such a model, or not complete.

    No code in the folder is run: an exported TokenFormer is loaded with this package's code, not with the copy there.
    """
    _refuse_others(folder)
    content = _read_config(folder)
    if b'"pattention"' in content:
        raise CheckpointError(f"{folder}: is an export with an adapter in it. Give the base that it was made from")
    return _load(folder, dtype, is_tokenformer=_model_type(folder, content) == MODEL_TYPE)


def load_exported(folder: Path) -> Any:
    """The model that `export_adapter` has written, with the code in its folder, in fp32. Errors as in `load_base`."""
    return _load(folder, torch.float32, trust_remote_code=True)


def _refuse_others(folder: Path) -> None:
    """CheckpointError, with what to give instead, for folders of this package that are not a base: a run, a checkpoint,
    an adapter, an image classifier. Weights are not read."""
    if os.path.lexists(folder / _CONFIG):
        if _model_type(folder, _read_config(folder)) == IMAGE_MODEL_TYPE:
            raise CheckpointError(
                f"{folder}: is a classifier of images, and adapters are for language models. Give the folder of one"
            )
    elif adapter_folder(folder) is not None:
        raise CheckpointError(f"{folder}: is an adapter, or a run of one. Give the base model that it was trained on")
    elif holds_run(folder):
        raise CheckpointError(
            f"{folder}: is a run or a checkpoint of one, and adapters are for models of transformers. Export it with "
            f"`megatron_tf convert to-hf {folder} --to` and a new folder, and give that"
        )


def _read_config(folder: Path) -> bytes:
    with file_errors(
        CheckpointError, folder / _CONFIG, "Give the folder of a base model, as save_pretrained writes it."
    ):
        return read_plain(folder / _CONFIG, _LARGEST_CONFIG)


def _model_type(folder: Path, config: bytes) -> Any:
    try:
        values = parse_json(config, finite=False)
    except NotJsonError as error:
        raise CheckpointError(f"{folder / _CONFIG}: is not JSON ({error}). Copy it again") from error
    return values.get("model_type") if isinstance(values, dict) else None


def _load(
    folder: Path, dtype: torch.dtype | str, *, is_tokenformer: bool = False, trust_remote_code: bool = False
) -> Any:
    require_peft()
    prepare_hugging_face()
    import transformers

    kind: Any = transformers.AutoModelForCausalLM
    if is_tokenformer:
        from megatron_tf.convert.huggingface.remote_code.modeling_tokenformer import TokenFormerForCausalLM as kind

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it as a causal language model ({first_line(error)}). Give a whole "
            "folder of weights and configuration"
        ) from error
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(map(str, report[kind]))
            raise CheckpointError(
                f"{folder}: the weights are not those of its {_CONFIG}: {kind.replace('_', ' ')} "
                f"{', '.join(names[:3])}. Give a whole folder of weights and configuration"
            )
    return model.eval()


def load_adapted(base: Any, adapters: Mapping[str, Path]) -> Any:
    """`base` with adapters by name, the first one active. CheckpointError as in `read_adapter`; ArgumentError when
    `base` is not the one that they were trained on."""
    from megatron_tf.adapters.tuner import with_adapters

    for folder in adapters.values():
        read_adapter(folder)
    return with_adapters(base, adapters)


def random_llama(layers: int, width: int, vocabulary: int) -> Any:
    """A Llama with random weights, for measurements of speed."""
    prepare_hugging_face()
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width * 2 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a base's folder. DataError when there is none, or it has no end of text; CheckpointError as in
    `load_base`. No code in the folder is run."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder. Give that of a model of transformers.")
    _refuse_others(folder)
    prepare_hugging_face()
    import transformers

    transformers.logging.set_verbosity_error()  # it would warn that it does not know the model type of a TokenFormer
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise errors of many types
        if not any(file for pattern in _VOCABULARIES for file in folder.glob(pattern)):
            raise DataError(
                f"{folder}: holds no tokenizer. Put the base's there, as its save_pretrained writes it."
            ) from error
        raise DataError(
            f"{folder}: transformers finds no tokenizer ({first_line(error)}). Put its files there"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(f"{folder}: its tokenizer has no end of text. Set eos_token in its tokenizer_config.json")
    return tokenizer


def random_ids(model: Any, seed: int = 0) -> Tensor:
    """Tokens [2, s] within the model's vocabulary and context."""
    config = model.config.get_text_config()
    length = min(getattr(config, "max_position_embeddings", None) or _SAMPLE, _SAMPLE)
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def random_logits(model: Any) -> Tensor:
    """Logits [2, s, vocabulary] on random tokens, fp32."""
    return model(input_ids=random_ids(model)).logits.float()
