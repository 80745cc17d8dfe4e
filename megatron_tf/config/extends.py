"""`extends: 124M.yml` in a configuration: the file shows only what differs from another one.

    extends: 124M.yml                  # a file next to this one, a path from this file's folder, or a shipped name
    run: {name: my_124M, dir: runs/my_124M}
    optimizer: {lr: 3.0e-4}

Sections are merged key by key. Lists and single values are replaced, and null removes an optional one. `run.name` and
`run.dir` are never taken from the other file: two runs must not write into one folder. Other relative paths keep their
meaning: they count from the folder in which the command is started.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_tf.errors import ConfigError
from megatron_tf.paths import expand
from megatron_tf.shipped import configurations

KEY = "extends"
_OWN_OF_A_RUN = ("name", "dir")

Values = dict[str, Any]
Reader = Callable[[str], tuple[Values, list[str]]]
Shipped = Callable[[], Mapping[str, Path]]


def read_extended(
    path: str, read: Reader, read_base: Reader, shipped: Shipped = configurations, extending: tuple[str, ...] = ()
) -> tuple[Values, list[str]]:
    """The plain values of `path` merged over those of the files that it extends, and the problems of all of them.

    `read`: returns the values and problems of one file; `read_base`: the same for a file that another one extends.
    `shipped`: returns the files that come with megatron_tf, by name. `extending`: real paths of the files that extend
    this one.
    ConfigError when a file is missing or extends itself; the message names every file on the way.
    """
    values, problems = (read_base if extending else read)(path)
    if KEY not in values:
        return values, problems
    base = _path_of_base(path, values.pop(KEY), shipped)
    extending = (*extending, os.path.realpath(path))
    if os.path.realpath(base) in extending:
        raise ConfigError(f"{path}: extends: {base} is a circle of files. Remove extends from one of them.")
    try:
        inherited, more = read_extended(base, read, read_base, shipped, extending)
    except ConfigError as error:
        raise ConfigError([f"{path}: extends: {problem}" for problem in error.problems]) from None
    if isinstance(inherited.get("run"), dict):
        inherited["run"] = {key: value for key, value in inherited["run"].items() if key not in _OWN_OF_A_RUN}
    return merged(inherited, values), [*more, *problems]


def merged(base: Values, extra: Values) -> Values:
    """A copy of `base` with the values of `extra`: mappings are merged, anything else is replaced."""
    out = copy.deepcopy(base)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def _path_of_base(path: str, given: Any, shipped: Shipped) -> str:
    """The file that `path` extends. A link counts as the file that it leads to."""
    if not isinstance(given, str) or not given or "\0" in given:
        shown = "null" if given is None else repr(given)
        raise ConfigError(
            f"{path}: extends: {shown}, but the path of one configuration is expected. Write it as extends: 124M.yml, "
            "or remove the line."
        )
    try:
        base = os.path.join(os.path.dirname(os.path.realpath(path)), expand(given))
    except ValueError as error:
        raise ConfigError(f"{path}: extends: {given!r}: {error}.") from None
    if "/" not in given and not os.path.exists(base):
        return str(shipped().get(given.removesuffix(".yml"), base))
    return base
