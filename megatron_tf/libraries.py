"""Hides the messages of libraries about themselves, but not their errors."""

from __future__ import annotations

import logging
import sys
import warnings

_OTHERS = ("torch", "deepspeed", "transformers", "peft", "accelerate")
_ABOUT_THEMSELVES = (FutureWarning, DeprecationWarning)


def quiet_warnings() -> None:
    """Silences deprecation warnings raised inside libraries, and DeepSpeed's log lines below the level of an error.

    Call it at the beginning of a command, before the libraries are imported; further calls change nothing. With
    Python's own option (`python -W default`) or PYTHONWARNINGS, the deprecation warnings are shown.
    """
    logger = logging.getLogger("DeepSpeed")
    if not any(isinstance(existing, ErrorsOnly) for existing in logger.filters):
        logger.addFilter(ErrorsOnly())
    if sys.warnoptions:
        return
    for name in _OTHERS:
        for category in _ABOUT_THEMSELVES:
            warnings.filterwarnings("ignore", category=category, module=rf"{name}(\.|$)")


class ErrorsOnly(logging.Filter):
    """Passes errors only. A filter and not a level, because DeepSpeed sets its logger's level when it is imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
