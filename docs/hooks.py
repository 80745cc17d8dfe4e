"""What the documentation takes from the code when it is built: `<!-- generated: NAME -->` on a page becomes its text.

mkdocs calls `on_page_markdown`. Nothing here needs mkdocs, so that tests call the generators.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).parents[1]
MARKER = re.compile(r"<!-- generated: (\w+) -->")
# The public names of the package, as module:name.
PYTHON_NAMES = (
    "megatron_tf:train",
    "megatron_tf.training.one_process:Trained",
    "megatron_tf.config:load_config",
    "megatron_tf.model:build_model",
    "megatron_tf.model:TokenFormer",
    "megatron_tf.model:Pattention",
    "megatron_tf.model.pattention:pattention",
    "megatron_tf.checkpoint:load_logical",
    "megatron_tf.convert.official:load_official_state_dict",
    "megatron_tf.adapters:PattentionConfig",
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return MARKER.sub(lambda match: GENERATORS[match[1]](), markdown)


def configuration() -> str:
    """Every key of a configuration."""
    from megatron_tf.config.reference import markdown

    return markdown()


class _Found(Exception):
    """Carries a command's parser out of the command."""


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that megatron_tf/commands/`module`.py makes for its arguments."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Found(parser)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", [module]))
        for method in ("parse_args", "parse_intermixed_args", "parse_known_args"):
            stack.enter_context(mock.patch.object(argparse.ArgumentParser, method, stop))
        try:
            importlib.import_module(f"megatron_tf.commands.{module}").main()
        except _Found as found:
            return found.args[0]
    raise AssertionError(f"{module} parses no arguments")


def commands() -> str:
    """The help of every command and of its modes, from their parsers."""
    from megatron_tf.__main__ import COMMANDS

    parts = []
    for name, command in COMMANDS.items():
        parser = parser_of(command.module)
        scripts = (f"{folder}/{command.module}.py" for folder in ("launch", "tools"))
        same = next((f" The same as `python {script}`." for script in scripts if (PROJECT / script).exists()), "")
        parts.append(f"## `megatron_tf {name}`\n\n{command.help[0].upper()}{command.help[1:]}.{same}")
        parts += [f"```text\n{text}```" for text in _help_texts(parser, f"megatron_tf {name}")]
    return "\n\n".join(parts)


def _help_texts(parser: argparse.ArgumentParser, name: str) -> Iterator[str]:
    parser.prog = name
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100)
    yield parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for mode, inner in action.choices.items():
                yield from _help_texts(inner, f"{name} {mode}")


def python() -> str:
    """Signature and docstring of each public name."""
    parts = []
    for place in PYTHON_NAMES:
        module, name = place.split(":")
        thing = getattr(importlib.import_module(module), name)
        signature = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(inspect.signature(thing)))  # annotations are text
        signature = re.sub(r", group: .*(?=\))", "", signature)  # of the ranks in training, never given by a user
        text = f"{'class ' if inspect.isclass(thing) else ''}{name}{signature}"
        parts.append(f"## `{module}.{name}`\n\n```python\n{text}\n```\n\n```text\n{inspect.getdoc(thing)}\n```")
    return "\n\n".join(parts)


def _docstring(module: str) -> str:
    return f"```text\n{inspect.getdoc(importlib.import_module(module))}\n```"


def floors() -> str:
    """The rooms of the package from the ground up, as tests/test_layers.py lists them."""
    source = (PROJECT / "tests" / "test_layers.py").read_text(encoding="utf-8")
    place: dict[str, Any] = {}
    exec(re.search(r"^FLOORS = \(.*?^\)", source, re.DOTALL | re.MULTILINE)[0], place)  # type: ignore[index]
    lines = ["| floor | rooms |", "|---|---|"]
    for number, names in reversed(list(enumerate(place["FLOORS"]))):
        shown = ", ".join(f"`{name.removeprefix('megatron_tf.')}`" for name in sorted(names))
        lines.append(f"| {number} | {shown} |")
    return "\n".join(lines)


def contributing() -> str:
    return (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n")[2].strip()


GENERATORS: dict[str, Callable[[], str]] = {
    "checkpoint_format": lambda: _docstring("megatron_tf.checkpoint.format"),
    "commands": commands,
    "configuration": configuration,
    "contributing": contributing,
    "deepspeed_patches": lambda: (
        inspect.getdoc(importlib.import_module("megatron_tf.engine.deepspeed.patches")) or ""
    ).partition("\n\n")[2],
    "floors": floors,
    "python": python,
}
