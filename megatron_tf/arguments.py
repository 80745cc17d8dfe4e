"""Types for argparse: numbers and paths on a command line. Any other text is a usage error that says what to give."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tf.errors import ArgumentError, UserError
from megatron_tf.paths import expand
from megatron_tf.shipped import find_configuration, find_study


@contextmanager
def options_for(**options: str) -> Iterator[None]:
    """Turns an ArgumentError of a function called in the block into a UserError that names the command-line option.

    `options`: argument -> option, as in `options_for(num_tokens="--tokens")`. Errors of other arguments stay as they
    are.
    """
    try:
        yield
    except ArgumentError as error:
        name, colon, problem = str(error).partition(":")
        if name not in options:
            raise
        raise UserError(f"{options[name]}{colon}{problem}") from error


def whole_number(most: int, least: int = 1) -> Callable[[str], int]:
    """A parser of whole numbers from `least` (not below 0) to `most`, both included."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 100 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text[:100]!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def number(least: float, most: float, expected: str | None = None) -> Callable[[str], float]:
    """A parser of finite numbers from `least` to `most`; `expected` names such a number in the message."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected or f'a number from {least:g} to {most:g}'}")
        return value

    return parse


def text_path(text: str) -> str:
    """A path as text, with `~` and environment variables replaced.

    The empty string is refused: it comes from an unset shell variable and would mean the current folder.
    """
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path; the current folder is written .")
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def path(text: str) -> Path:
    """As `text_path`, as a Path."""
    return Path(text_path(text))


def input_path(text: str) -> str:
    """As `text_path`, for a file or a glob that is read. A text with a `$` that names an existing path stays as it is:
    a shell's glob also finds names with a `$` in them."""
    return text if "$" in text and os.path.exists(text) else text_path(text)


def config_file(text: str) -> Path:
    """A configuration: the path of a file, or the name of one that comes with the package."""
    return find_configuration(text_path(text))


def study_file(text: str) -> Path:
    """A study: the path of a file, or the name of one that comes with the package."""
    return find_study(text_path(text))
