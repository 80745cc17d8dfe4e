"""What a configuration needs of the machine it runs on: files and optional packages. No torch, no process group.

Only their existence is checked here, so that a wrong path or a missing package is reported at once and by its key. The
code that reads a file checks its content.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of


def machine_problems(config: RunConfig) -> Iterator[str]:
    """Yields a sentence for each file and package that `config` names and this machine lacks.

    The source of a growth is not checked: it may be gone once the run has grown, or not be trained yet.
    """
    for name, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for number, source in enumerate(sources):
            yield from _prefix_problems(f"data.{name}[{number}].path", source.path, task_of(config.model).prepared_by)
    tokenizer = config.data.tokenizer
    is_file = tokenizer is not None and tokenizer != "bytes" and not tokenizer.startswith("tiktoken:")
    if tokenizer is not None and is_file and not os.path.isfile(tokenizer):
        reason = "is a directory, and a tokenizer is a file" if os.path.isdir(tokenizer) else "no such file"
        yield f"data.tokenizer: {tokenizer}: {reason}. Correct the path, or remove data.tokenizer."
    for package in config.logging.trackers:
        if not _is_installed(package):
            yield (
                f"logging.trackers: {package} is named but not installed. Install it with "
                f"`pip install 'megatron_tf[{package}]'`, or take it out of logging.trackers."
            )


def _prefix_problems(key: str, prefix: str, tool: str) -> Iterator[str]:
    missing = [f"{prefix}{ending}" for ending in (".bin", ".idx") if not os.path.isfile(prefix + ending)]
    if not missing:
        return
    remedy = f"Prepare the data with {tool}, or correct the path."
    if prefix.endswith((".bin", ".idx")):
        remedy = f"Give the common prefix of the two files: {prefix[:-4]}"
    yield f"{key}: {' and '.join(missing)}: no such file. {remedy}"


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # no origin: a plain folder, such as the "wandb" of its runs
