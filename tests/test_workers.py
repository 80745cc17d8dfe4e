"""Tests in several processes at a time (`pytest -n 2`): what one worker alone may have, and who gets which test."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import free_port

CONFTEST = Path(__file__).with_name("conftest.py")


@dataclass(eq=False)
class Item:
    nodeid: str
    marks: tuple[str, ...] = ()
    group: str = field(default="", init=False)

    def iter_markers(self):
        return [SimpleNamespace(name=name) for name in self.marks]

    def add_marker(self, mark):
        (self.group,) = mark.args


def given_out(items, **config):
    spec = importlib.util.spec_from_file_location("conftest_of_workers", CONFTEST)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    manager = SimpleNamespace(hasplugin=lambda name: name == "xdist")
    conftest.pytest_collection_modifyitems(SimpleNamespace(pluginmanager=manager, **config), items)
    return [(item.nodeid, item.group) for item in items]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
def test_a_file_is_of_one_worker_and_long_ones_come_first(monkeypatch):
    # without pytest-xdist its mark is not known, and unknown ones are errors
    monkeypatch.setattr(pytest.mark, "_config", None)
    items = [
        Item("tests/a/test_one.py::test_a"), Item("tests/b/test_two.py::test_a", ("slow",)),
        Item("tests/slurm/test_a.py::test_a", ("slow", "scale")), Item("tests/a/test_one.py::test_b[tests/slurm/test_x]"),
        Item("tests/slurm/test_b.py::test_a"), Item("tests/b/test_two.py::test_b", ("timing",)),
    ]  # fmt: skip
    assert given_out(items, workerinput={"workerid": "gw0"}) == [
        ("tests/slurm/test_a.py::test_a", "slurm"), ("tests/slurm/test_b.py::test_a", "slurm"),
        ("tests/b/test_two.py::test_a", "tests/b/test_two.py"), ("tests/a/test_one.py::test_a", "tests/a/test_one.py"),
        ("tests/a/test_one.py::test_b[tests/slurm/test_x]", "tests/a/test_one.py"), ("tests/b/test_two.py::test_b", "timing"),
    ]  # fmt: skip


def test_without_workers_the_order_stays():
    items = [Item("tests/a.py::test_a"), Item("tests/b.py::test_b", ("slow",))]
    assert given_out(items) == [("tests/a.py::test_a", ""), ("tests/b.py::test_b", "")]


def test_workers_have_ports_of_their_own(monkeypatch):
    for worker, thousand in (("gw0", 20), ("gw1", 21), ("gw11", 31), ("gw12", 20)):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
        assert free_port() // 1_000 == thousand
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    assert free_port() // 1_000 == 20
