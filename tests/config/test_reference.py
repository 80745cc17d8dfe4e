"""The configuration reference and the JSON schema say what the schema says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tf.commands.config import main
from megatron_tf.config.load import read_file
from megatron_tf.config.reference import FIRST_VERSION, entries, json_schema, markdown
from megatron_tf.config.yaml_core import parse_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
ENTRIES = {entry.key: entry for entry in entries()}
SCHEMA = json_schema()
UNITS = {"_steps": "steps", "_seconds": "seconds", "_hours": "hours", "batch_size": "samples", "_tokens": "tokens"}


def test_every_key_has_a_meaning():
    assert len(ENTRIES) > 90
    assert [key for key, entry in ENTRIES.items() if not entry.meaning.endswith(".")] == []


def test_an_entry_says_everything_about_its_key():
    hang = ENTRIES["run.hang_seconds"]
    assert (hang.type, hang.default, hang.unit) == ("number ≥ 1, ≤ 1e+07", "900", "seconds")
    assert (hang.meaning, hang.since) == ("A longer step, or a longer silence of a rank, ends the run.", FIRST_VERSION)
    assert ENTRIES["run.dir"].default is None
    assert (ENTRIES["growth"].type, ENTRIES["growth"].default) == ("section or null", "null")
    assert ENTRIES["growth.from"].type == "path"
    assert ENTRIES["data.train[].weight"].default == "1"
    assert ENTRIES["optimizer.betas"].default == "[0.9, 0.95]"


def test_keys_of_one_architecture_say_so():
    assert ENTRIES["model.architecture"].type == "`tokenformer`, `transformer`"
    assert ENTRIES["model.parameter_tokens"].meaning.endswith("Only with architecture tokenformer.")
    assert ENTRIES["model.ffn_hidden_size"].meaning.endswith("Only with architecture transformer.")
    assert ENTRIES["model.parameter_tokens.qkv"].unit == "tokens"


@pytest.mark.parametrize("ending, unit", UNITS.items())
def test_units_are_those_of_the_names(ending, unit):
    found = {key: entry.unit for key, entry in ENTRIES.items() if key.endswith(ending) and "number" in entry.type}
    # factors
    others = {"growth.lr_multipliers.old_tokens", "growth.lr_multipliers.new_tokens"}
    assert {key for key, given in found.items() if given != unit} - others == set()


def test_the_reference_is_a_table_for_each_section():
    text = markdown()
    assert [line.strip("# `") for line in text.splitlines() if line.startswith("## ")] == [
        key for key in ENTRIES if "." not in key and key not in ("extends", "deliver", "stages")
    ]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == len(ENTRIES) - text.count("## ")
    assert all(row.count(" | ") == 5 for row in rows)


def test_the_schema_next_to_the_shipped_configurations_is_this_one():
    """After a change of the schema: python -m megatron_tf config reference --schema > configs/schema.json"""
    assert json.loads((CONFIGS / "schema.json").read_text()) == SCHEMA


def unknown_keys(values: Any, node: dict[str, Any], key: str = "") -> Iterator[str]:
    """Keys of `values` that the schema `node` does not have."""
    options = [node, *node.get("anyOf", ())]
    options = [SCHEMA["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option for option in options]
    if isinstance(values, dict):
        properties = next(option["properties"] for option in options if "properties" in option)
        for name, value in values.items():
            if name in properties:
                yield from unknown_keys(value, properties[name], f"{key}.{name}")
            else:
                yield f"{key}.{name}"
    elif isinstance(values, list):
        item = next(option.get("items", {}) for option in options if option.get("type") == "array")
        for value in values:
            yield from unknown_keys(value, item, f"{key}[]")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yml")), ids=lambda path: path.stem)
def test_shipped_configurations_name_the_schema_and_follow_it(path):
    text = path.read_text(encoding="utf-8")
    assert text.partition("\n\n")[0].endswith("\n# yaml-language-server: $schema=schema.json")
    values, _ = parse_yaml(text, str(path))
    assert list(unknown_keys(values, SCHEMA)) == []
    assert list(unknown_keys(read_file(path)[0], SCHEMA)) == []


def test_the_schema_refuses_what_the_loader_refuses():
    assert list(unknown_keys({"optimizer": {"rate": 1}}, SCHEMA)) == [".optimizer.rate"]
    assert SCHEMA["additionalProperties"] is False and "required" not in SCHEMA["$defs"]["Model"]
    sources = SCHEMA["$defs"]["Data"]["properties"]["train"]["anyOf"]
    assert {option["type"] for option in sources} == {"string", "array"}
    tokens = SCHEMA["$defs"]["Model"]["properties"]["parameter_tokens"]
    assert {"type": "null"} in tokens["anyOf"] and "of" not in tokens


def test_the_command_prints_both(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["config", "reference"])
    main()
    assert capsys.readouterr().out == markdown()
    monkeypatch.setattr("sys.argv", ["config", "reference", "--schema"])
    main()
    assert json.loads(capsys.readouterr().out) == SCHEMA
