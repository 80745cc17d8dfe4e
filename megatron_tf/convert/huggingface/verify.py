"""Does an export compute what our own model does? It is loaded as a user would, with the code that lies in it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.convert.agreement import Agreement, agreement
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import CheckpointError, UserError
from megatron_tf.model.tokenformer import TokenFormer

REQUIRED_VERSIONS = ((5, 16), (6,))  # from the first on, below the second
_LONGEST_SAMPLE = 256  # tokens: a logit depends on all tokens before it, and seconds are enough


def require_transformers() -> str:
    """The version of transformers. UserError when it is missing, or one that the exported code does not run with."""
    least, below = REQUIRED_VERSIONS
    wanted = f"transformers>={'.'.join(map(str, least))},<{below[0]}"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise UserError(
            f"transformers is not installed, and an export is checked with it: pip install '{wanted}'"
        ) from None
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not least <= numbers < below:
        raise UserError(f"transformers is {version}, and the exported code needs another: pip install '{wanted}'")
    return version


@torch.no_grad()
def verify_export(folder: Path, network: TokenFormer, tokenizer: Tokenizer | None) -> dict[str, Agreement]:
    """Compare logits on random tokens and, where `tokenizer` is that of the export, on English text.

    Returns the agreement by kind of sample. CheckpointError when logits or tokens are others.
    """
    exported = _load_model(folder)
    samples = {"random tokens": _random_tokens(network)}
    if tokenizer is not None:
        samples["text"] = _text_tokens(folder, tokenizer)[:, : samples["random tokens"].shape[1]]
    found = {}
    for kind, ids in samples.items():
        expected = network(ids)
        if not expected.isfinite().all():
            raise CheckpointError(
                "the model's own logits are not finite: its training diverged. Use an earlier checkpoint"
            )
        found[kind] = agreement(exported(input_ids=ids).logits.float(), expected)
        if not found[kind].holds:
            raise CheckpointError(
                f"transformers computes another function from the export than this model is: on {kind}, {found[kind]}. "
                "Nothing was written. Please report this, with the versions of torch and transformers"
            )
    return found


def _load_model(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
    )
    if problems := {kind: names for kind, names in report.items() if names}:
        raise CheckpointError(f"transformers did not load the export as it was written: {problems}")
    return model.eval()


def _random_tokens(network: TokenFormer) -> Tensor:
    length = min(network.config.seq_length, _LONGEST_SAMPLE)
    return torch.randint(network.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


def _text_tokens(folder: Path, tokenizer: Tokenizer) -> Tensor:
    """[1, s], after the exported tokenizer has given the same tokens as ours."""
    import transformers

    exported = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    texts = list(_english())
    expected = tokenizer.encode_batch(texts)
    found = exported(texts, add_special_tokens=False)["input_ids"]
    if found != expected:
        raise CheckpointError(
            "transformers' tokenizer gives other tokens for English text than the one in training did"
        )
    return torch.tensor([[token for tokens in expected for token in tokens]])


def _english() -> Iterator[str]:
    """Text that comes with every Python: the words of its own manual."""
    from pydoc_data.topics import topics

    for name in ("assert", "class", "for", "strings"):
        yield topics[name]
