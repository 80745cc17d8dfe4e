"""The configuration reference: every key with type, default, unit, meaning and first version, read from the schema.

`json_schema` is for editors, `entries` and `markdown` are for people.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from megatron_tf.config.deliver import KEY as DELIVER
from megatron_tf.config.extends import KEY as EXTENDS
from megatron_tf.config.fields import PATH, Section
from megatron_tf.config.lookup import MEANING
from megatron_tf.config.schema import RunConfig

Node = dict[str, Any]
FIRST_VERSION = "0.1"
_NO_REAL_BOUND = 1e9  # larger ones only keep the arithmetic within 64 bits
_FILE_KEYS: dict[str, Node] = {
    EXTENDS: {
        "type": "string",
        "format": PATH,
        "description": "Configuration that this one is merged over: a path from its own folder, or a shipped name. "
        "run.name and run.dir are not taken from it.",
    },
    DELIVER: {
        "anyOf": [
            {
                "type": "object",
                "additionalProperties": False,
                "required": ["decay"],
                "properties": {
                    "decay": {
                        "type": "number",
                        "exclusiveMinimum": 0,
                        "exclusiveMaximum": 1,
                        "description": "Share of a stage's steps, the last ones, in which the rate decays. Since 0.2.",
                    }
                },
            },
            {"type": "null"},
        ],
        "default": None,
        "description": "Of a chain, or of one of its stages: each ends with a decay, and the next one grows from the "
        "state before it. Since 0.2.",
    },
    "stages": {
        "type": "array",
        "description": "Runs that grow from one another, in order. Each has a name and repeats only what differs from "
        "the common sections.",
    },
}


@dataclass(frozen=True)
class Entry:
    """A key as the reference shows it.

    `key`: with its path. `default`: as YAML; None when the key is required, empty when it is a section or has no
    default that could be shown. `unit`: empty for a pure number or text. `since`: first version with the key.
    """

    key: str
    type: str
    default: str | None
    unit: str
    meaning: str
    since: str


def json_schema() -> Node:
    """The JSON schema of a configuration file, for editors. No key is required, because a file may extend another."""
    root = _schema()
    definitions = root["$defs"]
    for node in (root, *definitions.values()):
        required = node.pop("required", ())
        for name, value in node["properties"].items():
            # a key of a variant may be null wherever it means nothing, and a section to have its defaults
            has_defaults = "$ref" in value and name not in required
            if (value.pop("of", None) or has_defaults) and {"type": "null"} not in value.get("anyOf", ()):
                about = {key: value.pop(key) for key in ("description", "default") if key in value}
                node["properties"][name] = {"anyOf": [value, {"type": "null"}], **about}
    sections = dict(root["properties"])
    stage = {"type": "object", "additionalProperties": False, "required": ["name"]}
    stage["properties"] = {"name": {"type": "string"}, **sections, DELIVER: _FILE_KEYS[DELIVER]}
    stages = {**_FILE_KEYS["stages"], "items": stage}
    root["properties"] = {EXTENDS: _FILE_KEYS[EXTENDS], **sections, DELIVER: _FILE_KEYS[DELIVER], "stages": stages}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root}


def entries() -> Iterator[Entry]:
    """Every key of a configuration in the order of the schema; a section comes before its keys."""
    root = _schema()
    yield from _entries({"properties": _FILE_KEYS}, {}, "")
    yield from _entries(root, root["$defs"], "")


def markdown() -> str:
    """The reference as Markdown: one table for each section."""
    by_section: dict[str, list[Entry]] = {}
    for entry in entries():
        by_section.setdefault(entry.key.partition(".")[0], []).append(entry)
    parts = [_table([entry for name in _FILE_KEYS for entry in by_section.pop(name)])]
    for name, found in by_section.items():
        parts += [f"## `{name}`", found[0].meaning, _table(found[1:])]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Entry]) -> str:
    lines = ["| key | type | default | unit | meaning | since |", "|---|---|---|---|---|---|"]
    for row in rows:
        default = "required" if row.default is None else f"`{row.default}`" if row.default else ""
        lines.append(f"| `{row.key}` | {row.type} | {default} | {row.unit} | {row.meaning} | {row.since} |")
    return "\n".join(lines)


def _schema() -> Node:
    """pydantic's schema with the keys of all variants of a section in that section."""
    root = RunConfig.model_json_schema()
    for field in RunConfig.model_fields.values():
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, Section) and section.variants() != (section,):
                _add_variants(root["$defs"], section)
    for node in (root, *root["$defs"].values()):
        node.pop("title", None)
        for value in node["properties"].values():
            value.pop("title", None)
    return root


def _add_variants(definitions: dict[str, Node], section: type[Section]) -> None:
    """Puts the keys of a section's variants into its definition, and the values that choose one.

    A key that not every variant has says in "of" which ones have it.
    """
    properties = definitions[section.__name__]["properties"]
    owners: dict[str, list[str]] = {}
    for variant in section.variants():
        own = variant.model_json_schema()
        definitions.update(own.pop("$defs", {}))
        chooser = next((key for key, node in own["properties"].items() if "const" in node and key in properties), "")
        name = own["properties"][chooser]["const"] if chooser else variant.__name__
        if chooser:
            properties[chooser].setdefault("enum", []).append(name)
        for key, node in own["properties"].items():
            if key not in properties or key in owners:
                owners.setdefault(key, []).append(f"{chooser} {name}".strip())
                properties.setdefault(key, node)
    for key, names in owners.items():
        if len(names) < len(section.variants()):
            about = properties[key].get("description", "")
            properties[key] |= {"of": names, "description": f"{about} Only with {' or '.join(names)}."}


def _entries(section: Node, definitions: Mapping[str, Node], prefix: str) -> Iterator[Entry]:
    required = section.get("required", ())
    for name, node in section["properties"].items():
        key = prefix + name
        yield _entry(key, node, definitions, name in required)
        inner, item = _section_of(node, definitions)
        if inner is not None:
            yield from _entries(inner, definitions, f"{key}[]." if item else f"{key}.")


def _entry(key: str, node: Node, definitions: Mapping[str, Node], required: bool) -> Entry:
    inner, item = _section_of(node, definitions)
    # pydantic leaves out the description of a key that is also that of its section
    about = MEANING.fullmatch(node.get("description") or (inner or {}).get("description", ""))
    assert about is not None
    is_section = inner is not None and not item
    default = None if required else "" if is_section or "default" not in node else _text(node["default"])
    if is_section and "default" in node and node["default"] is None:
        default = "null"
    return Entry(
        key, _type(node, definitions), default, about["unit"] or "", about["text"], about["since"] or FIRST_VERSION
    )


def _section_of(node: Node, definitions: Mapping[str, Node]) -> tuple[Node | None, bool]:
    """(the section that stands in a node, whether it is an item of a list there)."""
    if "$ref" in node:
        return definitions[node["$ref"].rpartition("/")[2]], False
    if "properties" in node:
        return node, False
    for inner, item in (
        [(node["items"], True)] if "items" in node else [(part, False) for part in node.get("anyOf", ())]
    ):
        section, nested = _section_of(inner, definitions)
        if section is not None:
            return section, item or nested
    return None, False


def _type(node: Node, definitions: Mapping[str, Node]) -> str:
    if "$ref" in node or "properties" in node:
        return "section"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(_type(part, definitions) for part in node["anyOf"]))
    if "enum" in node or "const" in node:
        return ", ".join(f"`{choice}`" for choice in node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind == "array":
        if "prefixItems" in node:
            parts = [_type(part, definitions) for part in node["prefixItems"]]
            return f"list of {len(parts)}: {'; '.join(dict.fromkeys(parts))} each"
        return f"list of {_type(node['items'], definitions)}" if "items" in node else "list"
    if kind in ("integer", "number"):
        return {"integer": "whole number", "number": "number"}[kind] + _bounds(node)
    if kind == "string":
        return "path" if node.get("format") == PATH else "text"
    return {"boolean": "true or false", "null": "null"}[str(kind)]


def _bounds(node: Node) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {_text(node[key])}" for key, sign in signs.items() if abs(node.get(key, 1e30)) < _NO_REAL_BOUND]
    if "multipleOf" in node:
        found.append(f"a multiple of {node['multipleOf']}")
    return " " + ", ".join(found) if found else ""


def _text(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
