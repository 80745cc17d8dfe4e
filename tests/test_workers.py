"""Tests in several processes at a time (`pytest -n 2`): what one worker alone may have, and who gets which test."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import launching
import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


@dataclass(eq=False)
class Item:
    nodeid: str
    marks: tuple[str, ...] = ()

    def iter_markers(self):
        return [SimpleNamespace(name=name) for name in self.marks]


@pytest.fixture
def conftest():
    spec = importlib.util.spec_from_file_location("conftest_of_workers", CONFTEST)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    return conftest


def test_a_file_stays_together_and_so_does_slurm(conftest):
    assert conftest.worker_group("tests/a/test_one.py::test_a[tests/slurm/test_x::y]") == "tests/a/test_one.py"
    assert conftest.worker_group("tests/slurm/test_a.py::test_a") == "tests/slurm"


def test_long_files_come_first(conftest):
    items = [
        Item("tests/a/test_one.py::test_a"), Item("tests/b/test_two.py::test_a", ("slow",)),
        Item("tests/a/test_one.py::test_b"),
        Item("tests/slurm/test_a.py::test_a", ("slow", "scale")), Item("tests/b/test_two.py::test_b"),
        Item("tests/slurm/test_b.py::test_a"),
    ]  # fmt: skip
    before = [item.nodeid for item in items]
    conftest.pytest_collection_modifyitems(SimpleNamespace(), items)
    assert [item.nodeid for item in items] == before, "without workers the order stays"
    conftest.pytest_collection_modifyitems(SimpleNamespace(workerinput={}), items)
    assert [item.nodeid for item in items] == [
        "tests/slurm/test_a.py::test_a", "tests/slurm/test_b.py::test_a", "tests/b/test_two.py::test_a",
        "tests/b/test_two.py::test_b", "tests/a/test_one.py::test_a", "tests/a/test_one.py::test_b",
    ]  # fmt: skip


@pytest.fixture
def ports_of(monkeypatch):
    """ports_of(worker) is `free_port`, of a process that is this worker of pytest, or none."""

    def ports(worker):
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker) if worker else monkeypatch.delenv("PYTEST_XDIST_WORKER")
        launching._ports.cache_clear()
        return launching.free_port

    yield ports
    launching._ports.cache_clear()


def test_workers_have_ports_of_their_own(ports_of):
    for worker, thousand in (("gw0", 20), ("gw1", 21), ("gw11", 31), ("gw12", 20), (None, 20)):
        assert ports_of(worker)() // 1_000 == thousand
