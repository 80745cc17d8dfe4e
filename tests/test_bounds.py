"""The script that raises upper bounds of dependencies: what it makes of setup.py, without installing anything."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
TEXT = """
PLOT = ["matplotlib>=3.8,<4"]  # before, <3
EVAL = ["lm_eval>=0.4.13,<0.4.14", *PLOT]
    "torch>=2.11,<2.14",
    "deepspeed==0.19.8",
    "rich>=13",
    "triton>=3.5,<4; platform_system == 'Linux'",
    "wandb>=0.31,<0.32",
"""


@pytest.fixture
def bounds():
    return runpy.run_path(str(PROJECT / ".ci" / "bounds.py"))


@pytest.mark.parametrize(
    ("name", "version", "line"),
    [
        ("torch", "2.13.9+cpu", '"torch>=2.11,<2.14"'),
        ("torch", "2.14.0", '"torch>=2.11,<2.15"'),
        ("torch", "3.0.1", '"torch>=2.11,<3.1"'),
        ("matplotlib", "4", '"matplotlib>=3.8,<5"'),
        ("lm_eval", "0.4.14", '"lm_eval>=0.4.13,<0.4.15"'),
        ("lm_eval", "0.5", '"lm_eval>=0.4.13,<0.5.1"'),
        ("triton", "4.1.0", "\"triton>=3.5,<5; platform_system == 'Linux'\""),
        ("deepspeed", "0.20.0", '"deepspeed==0.19.8"'),
        ("rich", "99", '"rich>=13"'),
        ("wandb", "0.40.2", '"wandb>=0.31,<0.41"'),
    ],
)
def test_a_bound_is_raised_as_precisely_as_it_was(bounds, name, version, line):
    new, changes = bounds["raised"](TEXT, {name: version})
    assert line in new
    assert len(changes) == (0 if line in TEXT else 1) and len(new.splitlines()) == len(TEXT.splitlines())
    assert all(change.startswith(f"{name}: {version} is installed, the bound ") for change in changes)


def test_what_is_installed_is_shown_for_every_requirement(bounds):
    text = (PROJECT / "setup.py").read_text()
    lines = bounds["shown"](text, bounds["installed"](text)).splitlines()
    names = [line.split()[0] for line in lines]
    assert names[0] == "python" and {"torch", "deepspeed", "transformers", "lm_eval", "ruff", "triton"} <= set(names)
    documentation = ("mkdocs",)  # comes with the first `make docs`
    assert [line for line in lines if "not installed" in line and not line.startswith(documentation)] == []


@pytest.mark.parametrize("passes", [True, False])
def test_bounds_are_kept_only_if_the_tests_pass(bounds, monkeypatch, tmp_path, capsys, passes):
    setup = tmp_path / "setup.py"
    setup.write_text(TEXT)
    try_out = bounds["try_out"]
    monkeypatch.setitem(try_out.__globals__, "SETUP", setup)
    monkeypatch.setitem(try_out.__globals__, "write", setup.write_text)
    (tmp_path / "test_it.py").write_text(f"def test_it():\n    assert {passes}, open('setup.py').read()\n")
    new = TEXT.replace("<2.14", "<2.15")
    assert (try_out(TEXT, new, ["-p", "no:cacheprovider"]) == 0) == passes
    assert setup.read_text() == (new if passes else TEXT)
    assert ("are raised" in capsys.readouterr().out) == passes


def test_every_requirement_has_an_upper_bound():
    """Of lines in setup.py that name a package."""
    requirement = runpy.run_path(str(PROJECT / ".ci" / "bounds.py"))["REQUIREMENT"]
    found = list(requirement.finditer((PROJECT / "setup.py").read_text()))
    assert len(found) >= 20
    assert [match[0] for match in found if match[2].startswith(">=") and match[3] is None] == []
