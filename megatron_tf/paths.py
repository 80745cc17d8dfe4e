"""Replaces `~` and environment variables in paths from configurations, overrides and command lines.

A shell replaces them only in some places: not after `run.dir=` or `--to=`, and not in a YAML file. Unreplaced, `~`
would name a folder of that name below the current one.
"""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expand(text: str) -> str:
    """`text` with `$NAME`, `${NAME}`, and a `~` or `~user` at its beginning, replaced. `$$` is a dollar sign.

    ValueError, with a sentence for the user, when a variable is unset or empty or a user is unknown: without the value
    the path would be a different one.
    """
    text = _VARIABLE.sub(_value, text)
    if not text.startswith("~"):
        return text
    user, slash, rest = text.partition("/")
    home = os.path.expanduser(user)
    if home == user or (user == "~" and not os.environ.get("HOME", "unset")):
        raise ValueError(
            "no home folder is known for ~; set HOME, or write the path in full"
            if user == "~"
            else f"there is no user {user[1:]!r}; write ./{user} for a name that begins with ~"
        )
    return home + slash + rest


def literal(path: str) -> str:
    """The text that `expand` turns back into `path`, which is expanded already."""
    return path.replace("$", "$$")


def _value(match: re.Match[str]) -> str:
    if match["dollar"]:
        return "$"
    name = match["name"] or match["braced"] or ""
    value = os.environ.get(name)
    if not value:
        state = "is not set" if value is None else "is empty"
        raise ValueError(f"the environment variable {name!r} {state}; set it, or write $$ for a dollar sign")
    return value
