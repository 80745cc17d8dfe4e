"""What libraries say about themselves is not shown; what is wrong is."""

from __future__ import annotations

import logging
import sys
import warnings

_OTHERS = ("torch", "deepspeed", "transformers", "peft", "accelerate")
_ABOUT_THEMSELVES = (FutureWarning, DeprecationWarning)


def quiet_warnings() -> None:
    """Silences deprecations of libraries by each other, and DeepSpeed's lines below errors. May be called again.

    For the beginning of a command, before they are imported. With Python's own option (`python -W default`) or
    PYTHONWARNINGS the deprecations are shown.
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
    """A filter and not a level: DeepSpeed sets the level of its logger when it is imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR
