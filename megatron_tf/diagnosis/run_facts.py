"""The facts that all ranks of a run must share: configuration, data as each node sees them, and software."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_tf.config.schema import RunConfig
from megatron_tf.data.loader import content_digest
from megatron_tf.data.tokenizer_identity import tokenizer_identity
from megatron_tf.diagnosis.software import software_facts
from megatron_tf.errors import UserError, shortened
from megatron_tf.runtime.facts import COMMAND

VALUE_LIMIT = 200  # characters
NO_OPTIONS: Mapping[str, object] = {}


def run_facts(
    command: str, stages: Sequence[RunConfig], options: Mapping[str, object] = NO_OPTIONS, data: Sequence[str] = ()
) -> dict[str, str]:
    """Facts for `runtime.facts.agree`: names and values that read "NAME is VALUE".

    `options`: of `command`; None for one that is not given. `stages`: the run, or the stages of a chain. `data`:
    prefixes that are read besides those of the configuration.
    """
    facts = {COMMAND: command}
    facts |= {name: json.dumps(value, default=str) for name, value in options.items() if value is not None}
    for config in stages:
        stage = f"stage {config.run.name}: " if len(stages) > 1 else ""
        facts |= {f"{stage}{key}": value for key, value in settings(config).items()}
    sources = (source.path for config in stages for source in (*config.data.train, *config.data.validation))
    for prefix in dict.fromkeys((*sources, *data)):
        facts[f"the data {prefix}"] = _read(content_digest, prefix)
    for tokenizer in dict.fromkeys(config.data.tokenizer for config in stages):
        if tokenizer is not None:
            facts[f"the tokenizer {tokenizer}"] = _read(_tokenizer, tokenizer)
    return facts | software_facts(os.environ)


def settings(config: RunConfig) -> dict[str, str]:
    """Every key of a configuration, such as "data.train[0].path", with its value as text.

    run.dir is made absolute, because a relative one is another folder on a rank that was started elsewhere.
    """
    run = config.run.model_copy(update={"dir": os.path.abspath(config.run.dir)})
    return dict(_leaves(config.model_copy(update={"run": run}).model_dump(by_alias=True), ""))


def defaults(config: RunConfig) -> set[str]:
    """The keys of `settings` that have their default values."""
    chosen = dict(_leaves(config.model_dump(by_alias=True, exclude_defaults=True), ""))
    return settings(config).keys() - chosen.keys()


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, value as text) of every value in nested sections and lists of sections. A key: data.train[0].path."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}[{number}]")
    else:
        yield key, value if isinstance(value, str) else json.dumps(value, default=str)


def _tokenizer(path: str) -> str:
    return f"SHA-256 {tokenizer_identity(path).content[:12]}"


def _read(in_words: Callable[[str], str], path: str) -> str:
    """`in_words(path)`, or "not readable (...)".

    No error is raised here: files that no rank can read are reported after the ranks have met. Here only differences
    between ranks matter.
    """
    try:
        return in_words(path)
    except (UserError, OSError) as error:
        return f"not readable ({shortened(str(error), VALUE_LIMIT)})"
