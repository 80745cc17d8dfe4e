"""YAML as configuration files mean it: the core schema of YAML 1.2, without duplicate keys or object tags.

PyYAML alone follows YAML 1.1, which reads `6e-4` as text, `no` as false, `010` as 8, `1:30` as 90 and
`1_000` as 1000, and which lets the second of two equal keys win without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import yaml

from megatron_tf.errors import ConfigError

# tag -> (pattern of a plain scalar, characters it can begin with); https://yaml.org/spec/1.2.2, section 10.3.2
_PLAIN_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_TAG = "tag:yaml.org,2002:"
_LINE_ENDS_OF_OLD = re.compile("[\x85\u2028\u2029]")
_MOST_DIGITS = 400
_MOST_VALUES = 200_000  # aliases expanded: a few lines of nested ones can stand for more than memory holds


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str, Any]] = {}  # filled below: nothing but the core types can be made


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a value that occurs twice is written twice: `&id001` is hard to read


for _name, (_pattern, _first) in _PLAIN_SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits in line {node.start_mark.line + 1}")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))  # `010` is ten in YAML 1.2


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


def _construct_str(loader: _Loader, node: yaml.ScalarNode) -> str:
    return loader.construct_scalar(node)


def _represent_str(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # In double quotes they are written as escapes, which every version of YAML reads the same way.
    style = '"' if _LINE_ENDS_OF_OLD.search(text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_str)
for _name in ("null", "bool", "seq", "map"):
    _Loader.add_constructor(_TAG + _name, yaml.SafeLoader.yaml_constructors[_TAG + _name])
_Loader.add_constructor(_TAG + "int", _construct_int)
_Loader.add_constructor(_TAG + "float", _construct_float)
_Loader.add_constructor(_TAG + "str", _construct_str)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def parse_yaml(text: str, origin: str, section: str = "") -> tuple[Any, list[str]]:
    """(value, problems) of one YAML document; the value of an empty one is None.

    `origin` names the text in messages (a path, or an override); `section` stands before its keys. The problems are
    duplicate keys, each with both lines, and keys that are not text; the value is then what remains, so that a
    caller can go on and report what else is wrong. Raises ConfigError when there is no value: broken YAML, a tag
    that would build anything but the core types, an alias that contains itself, too many values, too deep nesting,
    and characters that YAML 1.1 takes for line ends.
    """
    if line_end := _LINE_ENDS_OF_OLD.search(text):
        line = text.count("\n", 0, line_end.start()) + 1
        code = f"U+{ord(line_end[0]):04X}"
        raise ConfigError(
            f"{origin}: line {line} has the character {code}, which only YAML 1.1 takes for a line end. Remove it."
        )
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, []
            problems = list(_drop_bad_keys(node, origin, section, (), iter(range(_MOST_VALUES))))
            return loader.construct_document(node), problems
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        why = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{origin}: not a plain YAML document{where}: {why}. Correct it there.") from error
    except (yaml.YAMLError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"{origin}: not a plain YAML document: {why}. Correct it.") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deeply for a configuration. Make it flat.") from error


def _drop_bad_keys(
    node: yaml.Node, origin: str, path: str, parents: tuple[int, ...], budget: Iterator[int]
) -> Iterator[str]:
    """Remove second occurrences of keys and keys that are not text from `node`; yields a sentence for each.

    `path`: key of `node` in messages; `parents`: ids of the nodes around it. `budget`: one item is taken for each
    value; ConfigError when none is left, or when `node` contains itself.
    """
    if next(budget, None) is None:
        raise ConfigError(f"{origin}: stands for more than {_MOST_VALUES:,} values. Write out what aliases (*) repeat.")
    if id(node) in parents:
        raise ConfigError(f"{origin}: {path} is an alias (*) of something that contains it. Write the value out.")
    parents = (*parents, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _drop_bad_keys(item, origin, f"{path}[{index}]", parents, budget)
    if not isinstance(node, yaml.MappingNode):
        return
    kept: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag != _TAG + "str":
            given = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            yield f"{origin}: line {line} has the key {given or 'null'}, but every key is a name. Write a name there."
            continue
        key = f"{path}.{key_node.value}" if path else key_node.value
        if key_node.value in kept:
            first = kept[key_node.value][0].start_mark.line + 1
            lines = f"in line {first} and in line {line}" if line != first else f"both in line {line}"
            yield f"{key}: given twice in {origin}, {lines}. Keep one of them."
            continue
        kept[key_node.value] = (key_node, value_node)
        yield from _drop_bad_keys(value_node, origin, key, parents, budget)
    node.value = list(kept.values())


def dump_yaml(value: Any) -> str:
    """Text that `parse_yaml` reads back to an equal value. Tuples become lists; order is kept."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False)
