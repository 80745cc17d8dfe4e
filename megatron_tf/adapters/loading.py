"""A base model of transformers from its folder, with adapters on it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.adapters.folder import read_adapter
from megatron_tf.caches import prepare_hugging_face
from megatron_tf.convert.huggingface.verify import require_transformers
from megatron_tf.errors import CheckpointError, UserError, first_line
from megatron_tf.requirements import is_wanted, wanted_versions


def require_peft() -> str:
    """The version of PEFT. UserError when it, or transformers, is missing or one that adapters do not work with."""
    require_transformers()
    wanted = f"peft{wanted_versions('peft')}"
    try:
        version = metadata.version("peft")
    except metadata.PackageNotFoundError:
        raise UserError(f"peft is not installed, and adapters are a method of it: pip install '{wanted}'") from None
    if not is_wanted("peft", version):
        raise UserError(f"peft is {version}, and adapters need another: pip install '{wanted}'")
    return version


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model in a folder, in evaluation mode. CheckpointError when there is none to be loaded."""
    require_peft()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has no config.json. Give the folder of a base model, as save_pretrained of transformers writes it"
        )
    prepare_hugging_face()
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"{folder}: transformers cannot load it as a causal language model ({first_line(error)}). Give a whole folder "
            "of weights and configuration"
        ) from error
    return model.eval()


def load_adapted(base: Any, adapters: Mapping[str, Path]) -> Any:
    """`base` with adapters by name, the first one active. Errors: those of `read_adapter`, and of another base."""
    from megatron_tf.adapters.tuner import with_adapters

    for folder in adapters.values():
        read_adapter(folder)
    return with_adapters(base, adapters)


@torch.no_grad()
def random_logits(model: Any, seed: int = 0) -> Tensor:
    """Logits [2, s, vocabulary] on random tokens, fp32."""
    config = model.config.get_text_config()
    length = min(getattr(config, "max_position_embeddings", None) or 32, 32)
    ids = torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).logits.float()
