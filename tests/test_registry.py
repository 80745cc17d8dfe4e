from __future__ import annotations

import math

import pytest

from megatron_tf.registry import Registry


def test_built_in_objects_are_imported_when_asked_for():
    registry: Registry[float] = Registry({"pi": "math:pi", "lost": "no_such_module:thing"})
    assert registry["pi"] == math.pi
    assert registry.names() == ("pi", "lost") and "lost" in registry
    with pytest.raises(ModuleNotFoundError):
        registry["lost"]
    with pytest.raises(KeyError):
        registry["e"]


def test_names_are_taken_once():
    registry: Registry[float] = Registry({"pi": "math:pi"})
    registry.register("pi", math.pi)
    registry.register("e", math.e)
    assert registry.names() == ("pi", "e") and registry.added() == {"e": math.e}
    with pytest.raises(ValueError, match=r"'e' is the name of 2.718\S* already"):
        registry.register("e", 3.0)


def test_an_object_for_a_while():
    registry: Registry[float] = Registry({})
    with registry.registered("e", math.e):
        assert registry["e"] == math.e
    assert "e" not in registry
