"""Checks that an export computes what our own model does. It is loaded as a user would load it, with its own code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.caches import prepare_hugging_face
from megatron_tf.convert.agreement import Agreement, agreement
from megatron_tf.convert.huggingface.choices import Choices
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.errors import CheckpointError, UserError
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.requirements import is_wanted, wanted_versions
from megatron_tf.tasks.language_model.section import vocab_size_of

_LONGEST_SAMPLE = 256  # tokens: each logit tests all tokens before it, and the check should take seconds only
_LONGEST_PROMPT, _CONTINUATION = 8, 4  # tokens: a cache that is not read shows at the second new one
# White space, other scripts, and characters that take several bytes or are not in the vocabulary.
_ODD_TEXTS = (
    "",
    " ",
    "  two  spaces ",
    "tab\tand\r\nline\n\n",
    "Ångström, naïve",
    "你好，世界",
    "\U0001f642\u200d\ufeff",
    "x" * 300,
)
# The ways in which `generate` can cache the keys and values of tokens it has read.
_CACHES: dict[str, dict[str, Any]] = {
    "without a cache": {"use_cache": False},
    "with a dynamic cache": {},
    "with a static cache": {"cache_implementation": "static"},
}


def require_transformers() -> str:
    """The version of transformers. UserError when it is missing or has a version that the exported code does not
    support."""
    wanted = f"transformers{wanted_versions('transformers')}"
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        raise UserError(
            f"transformers is not installed, and an export is checked with it: pip install '{wanted}'"
        ) from None
    if not is_wanted("transformers", version):
        raise UserError(f"transformers is {version}, and the exported code needs another: pip install '{wanted}'")
    return version


def verifying_versions() -> dict[str, str]:
    """Name -> version of the packages with which an export is checked. UserError as `require_transformers`."""
    return {"transformers": require_transformers(), "torch": torch.__version__}


def verified_with(versions: Mapping[str, str]) -> str:
    """`verifying_versions` as the comment that begins an export's code, without a full stop."""
    return "# Verified with " + " and ".join(f"{name} {version}" for name, version in versions.items())


@torch.no_grad()
def verify_export(folder: Path, network: TokenFormer, tokenizer: Tokenizer | None) -> dict[str, Agreement]:
    """Compare the export in `folder` with `network` on random tokens, on English text, and in generation.

    `tokenizer`: the one that the export contains; None: without one, no text is compared. Returns the agreement by kind
    of sample. CheckpointError when logits or tokens differ.
    """
    prepare_hugging_face()
    exported = load_exported(folder, "AutoModelForCausalLM")
    choices = Choices(exported)
    samples = {"random tokens": _random_tokens(network)}
    if tokenizer is not None:
        samples["text"] = _text_tokens(folder, tokenizer)[:, : samples["random tokens"].shape[1]]
    found = {}
    for kind, ids in samples.items():
        found[kind] = compare_logits(kind, exported, choices, network, {"input_ids": ids})
    found["generation"] = _compare_generation(exported, choices, network, samples["random tokens"])
    return found


def compare_logits(
    kind: str, exported: Any, choices: Choices, network: TokenFormer, inputs: Mapping[str, Tensor]
) -> Agreement:
    """The agreement of the logits of one forward pass. CheckpointError when they differ.

    `kind`: of sample, for messages.  `inputs`: one tensor [b, ...] under the name of the exported model's argument.
    """
    with transformers_errors(kind), choices.recorded():
        logits = exported(**inputs).logits.float()
    (own,) = inputs.values()
    with choices.replayed(network, len(own)):
        expected = network(own)
    if not expected.isfinite().all():
        raise CheckpointError("the model's own logits are not finite: its training diverged. Use an earlier checkpoint")
    return checked(kind, logits, expected)


def _compare_generation(exported: Any, choices: Choices, network: TokenFormer, ids: Tensor) -> Agreement:
    """Let transformers continue prompts of two lengths, padded on the left, with each kind of cache. Returns the worst
    agreement.

    The reference is `network` on each whole text alone, without padding and cache. Logits are compared and not the
    chosen tokens, because rounding decides between two tokens that are equally likely.
    """
    longest = network.config.seq_length
    new = min(_CONTINUATION, max(2, longest // 2), longest)
    prompt = min(_LONGEST_PROMPT, longest - new + 1)  # the last new token is not read
    lengths = (prompt, max(1, prompt // 2))
    ids = ids[:, :prompt]
    mask = torch.tensor([[0] * (prompt - length) + [1] * length for length in lengths])
    found = []
    for cache, options in _CACHES.items():
        kind = f"generation {cache}"
        with transformers_errors(kind), choices.recorded():
            out = exported.generate(
                ids * mask,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                return_dict_in_generate=True,
                output_logits=True,
                **options,
            )
        for row, length in enumerate(lengths):
            padding = prompt - length
            with choices.replayed(network, len(lengths), slice(row, row + 1), padding):
                expected = network(out.sequences[row : row + 1, padding:-1])[0, length - 1 :]
            logits = torch.stack([step[row] for step in out.logits]).float()
            found.append(checked(kind, logits, expected))
    return max(found, key=lambda one: one.error)


@contextmanager
def transformers_errors(kind: str) -> Iterator[None]:
    """Turn any error of transformers or of the export's code in the block into a CheckpointError. An OSError passes
    unchanged, because it names its file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot run the export, on {kind}: {type(error).__name__}: {error}. Nothing was written. "
            "Please report this, with the versions of torch and transformers"
        ) from error


def checked(kind: str, found: Tensor, expected: Tensor) -> Agreement:
    """The agreement of the logits `found` with `expected`. CheckpointError when they differ beyond the tolerance."""
    result = agreement(found, expected)
    if not result.holds:
        raise CheckpointError(
            f"transformers computes another function from the export than this model is: on {kind}, {result}. "
            "Nothing was written. Please report this, with the versions of torch and transformers"
        )
    return result


def load_exported(folder: Path, auto_class: str) -> Any:
    """The exported model in fp32, loaded with `auto_class` of transformers, such as "AutoModelForCausalLM".

    CheckpointError when it does not load completely.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with transformers_errors("loading"):
        model, report = getattr(transformers, auto_class).from_pretrained(
            folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    if problems := {kind: names for kind, names in report.items() if names}:
        raise CheckpointError(f"transformers did not load the export as it was written: {problems}")
    return model.eval()


def load_processor(folder: Path) -> Any:
    """The image processor of the export in `folder`. CheckpointError when it does not load."""
    import transformers

    with transformers_errors("loading the image processor"):
        return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True)


def _random_tokens(network: TokenFormer) -> Tensor:
    length = min(network.config.seq_length, _LONGEST_SAMPLE)
    return torch.randint(vocab_size_of(network.config), (2, length), generator=torch.Generator().manual_seed(0))


def _text_tokens(folder: Path, tokenizer: Tokenizer) -> Tensor:
    """Ids of English text, [1, s]. CheckpointError unless the exported tokenizer gives the same ids as ours, also for
    unusual texts."""
    import transformers

    texts = list(_english())
    expected = tokenizer.encode_batch(texts)
    with transformers_errors("text"):
        exported = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        # Called as a user would, so that tokens which it adds around a text by itself show up.
        found = exported([*texts, *_ODD_TEXTS])["input_ids"]
    if found[: len(texts)] != expected:
        raise CheckpointError(
            "transformers' tokenizer gives other tokens for English text than the one in training did"
        )
    for text, ids, own in zip(_ODD_TEXTS, found[len(texts) :], tokenizer.encode_batch(list(_ODD_TEXTS))):
        if ids != own:
            raise CheckpointError(
                f"transformers' tokenizer gives the tokens {ids} for {text!r}, the one in training gave {own}"
            )
    return torch.tensor([[token for tokens in expected for token in tokens]])


def _english() -> Iterator[str]:
    """Text that comes with every Python: the words of its own manual."""
    from pydoc_data.topics import topics

    for name in ("assert", "class", "for", "strings"):
        yield topics[name]
