from __future__ import annotations

import math

import pytest

from megatron_tf.config.yaml_core import dump_yaml, parse_yaml
from megatron_tf.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("+3", 3),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'6e-4'", "6e-4"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("354M", "354M"),
        ("=", "="),
        ("<<: {a: 1}", {"<<": {"a": 1}}),
        ("[1, a, .5]", [1, "a", 0.5]),
        ("{on: 1, no: 2}", {"on": 1, "no": 2}),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
    ],
)
def test_reads_the_core_schema_of_yaml_1_2(text, value):
    found, problems = parse_yaml(text, "file")
    assert (found, problems) == (value, [])
    assert type(found) is type(value)


def test_reads_not_a_number():
    assert math.isnan(parse_yaml(".nan", "file")[0])


@pytest.mark.parametrize(
    "value",
    [
        *("1e3", "6e-4", "0o17", "0x1", "010", "true", "null", "~", "", "yes", "1_000", "a: b", "# no", " x", "é\n"),
        *("=", "<<", 1e-5, 6e-4, 1e16, 123456789.125, math.inf, -math.inf, 10**20, -1, True, None, {}, []),
    ],
)
def test_dumped_values_are_read_back_equal_and_of_the_same_type(value):
    found, problems = parse_yaml(dump_yaml({"key": value, "again": [value, {"k": value}]}), "file")
    assert problems == []
    assert found == {"key": value, "again": [value, {"k": value}]}
    assert type(found["key"]) is type(value)


def test_dump_writes_tuples_as_lists_and_repeats_instead_of_aliases():
    shared = (1, 2)
    text = dump_yaml({"b": shared, "a": shared})
    assert parse_yaml(text, "file")[0] == {"b": [1, 2], "a": [1, 2]}
    assert "&" not in text
    assert text.index("b:") < text.index("a:")


def test_every_duplicate_key_is_named_with_both_lines():
    text = "a:\n  x: 1\n  y: 2\n  x: 3\nb: [{p: 1, p: 2}]\na: 5\n"
    value, problems = parse_yaml(text, "run.yml")
    assert problems == [
        "a.x: given twice in run.yml, in line 2 and in line 4. Keep one of them.",
        "b[0].p: given twice in run.yml, both in line 5. Keep one of them.",
        "a: given twice in run.yml, in line 1 and in line 6. Keep one of them.",
    ]
    assert value == {"a": {"x": 1, "y": 2}, "b": [{"p": 1}]}


@pytest.mark.parametrize(("text", "shown"), [("1: x", "1"), ("~: x", "~"), ("[a]: x", "a list"), ("true: x", "true")])
def test_a_key_that_is_not_a_name_is_a_problem(text, shown):
    value, problems = parse_yaml(f"a: 1\n{text}", "run.yml")
    assert value == {"a": 1}
    assert len(problems) == 1
    assert f"line 2 has the key {shown}" in problems[0]


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: !!python/tuple [1]",
        "a: !!binary aGk=",
        "a: !!set {x}",
        "a: !mine 1",
        "!!timestamp 2024-01-01",
    ],
)
def test_tags_build_nothing_but_the_core_types(text):
    with pytest.raises(ConfigError, match=r"run\.yml: not a plain YAML document at line 1, column .*tag"):
        parse_yaml(text, "run.yml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: 2", "line 2, column"),
        ("a: 1\n\tb: 2", "line 2, column 1"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: &x {b: *x}", "a.b is an alias"),
        ("a: *nowhere", "undefined alias"),
        ("a: !!int seven", "not a plain YAML document"),
        ("a: \x00", "not a plain YAML document"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        (f"a: {'9' * 5000}", "a number of 5,000 digits in line 1"),
        (f"b:\n- 0x{'f' * 5000}", "a number of 5,002 digits in line 2"),
        (
            "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi")),
            "stands for more than 200,000 values",
        ),
    ],
)
def test_broken_documents_name_the_file_and_the_place(text, message):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "run.yml")
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith("run.yml: ")
    assert message in error.value.problems[0]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_characters_that_only_yaml_1_1_takes_for_line_ends(character):
    """PyYAML would make a key of the rest of a comment."""
    with pytest.raises(ConfigError, match=rf"file: line 2 has the character U\+{ord(character):04X}"):
        parse_yaml(f"a: 1\n# comment{character}b: 2\n", "file")
    assert parse_yaml(dump_yaml({"a": f"x{character}y"}), "file") == ({"a": f"x{character}y"}, [])
