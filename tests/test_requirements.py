from __future__ import annotations

from importlib import metadata

import pytest

from megatron_tf import requirements
from megatron_tf.diagnosis.installation import installed_packages, machine_warnings


@pytest.fixture
def said(monkeypatch):
    """The lines of the metadata."""
    lines = [
        "torch<2.14,>=2.11",
        "PyYAML<7,>=6",
        'lm_eval<0.4.14,>=0.4.13; extra == "eval"',
        "rich",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    requirements._requirements.cache_clear()
    yield lines
    requirements._requirements.cache_clear()


def test_versions_are_those_of_the_metadata(said):
    assert requirements.wanted_versions("torch") == ">=2.11,<2.14"
    assert requirements.wanted_versions("pyyaml") == ">=6,<7"
    assert requirements.wanted_versions("lm-eval") == requirements.wanted_versions("lm_eval") == ">=0.4.13,<0.4.14"
    assert requirements.wanted_versions("rich") == requirements.wanted_versions("unheard-of") == ""
    for version, wanted in {"0.4.13": True, "0.4.13.post1": True, "0.4.14": False, "0.4.9": False}.items():
        assert requirements.is_wanted("lm_eval", version) == wanted
    assert requirements.is_wanted("rich", "1")


def test_without_an_installation_nothing_is_compared_and_the_doctor_says_so(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    requirements._requirements.cache_clear()
    assert requirements.wanted_versions("torch") == "" and requirements.is_wanted("torch", "1.0")
    assert all(found.right or found.version is None for found in installed_packages())
    assert any(warning.startswith("megatron_tf itself is not installed") for warning in machine_warnings(0))
    requirements._requirements.cache_clear()
