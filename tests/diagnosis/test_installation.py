from __future__ import annotations

import runpy
from importlib import metadata
from pathlib import Path

import pytest
import setuptools

from megatron_tf.diagnosis import installation
from megatron_tf.diagnosis.installation import PACKAGES, installed_packages, machine_warnings, system_facts

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def packaging(monkeypatch):
    """The arguments of setup()."""
    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(PROJECT / "setup.py"))
    return said


def test_what_setup_requires_is_looked_for_in_the_same_versions(packaging):
    by_name = {package.name: package for package in PACKAGES}
    for requirement in packaging["install_requires"]:
        name = next(name for name in by_name if requirement.startswith(name))
        assert name + by_name[name].wanted == requirement
        assert by_name[name].essential == (name != "deepspeed")  # the doctor, tools and the model work without it
    extras = {text for texts in packaging["extras_require"].values() for text in texts}
    for package in PACKAGES:
        if not package.essential and package.name != "deepspeed":
            assert package.name + package.wanted in extras
            extra = package.install.partition("[")[2].partition("]")[0]
            assert package.name + package.wanted in packaging["extras_require"][extra]


@pytest.mark.parametrize(
    ("version", "right"),
    [("2.13.0+cpu", True), ("2.11", True), ("2.10.1", False), ("2.14.0", False), ("2.9", False), ("3.0", False)],
)
def test_versions(monkeypatch, version, right):
    monkeypatch.setattr(metadata, "version", lambda name: version)
    torch = next(found for found in installed_packages() if found.package.name == "torch")
    assert torch.right == right
    assert torch.problem is None if right else torch.problem.startswith(f"torch {version} is not >=2.11,<2.14: needed")


def test_an_exact_version(monkeypatch):
    for version, right in (("0.19.8", True), ("0.19.80", False), ("0.19", False)):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        assert next(f for f in installed_packages() if f.package.name == "deepspeed").right == right


def test_what_is_missing_says_what_it_would_enable(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    problems = [found.problem for found in installed_packages()]
    assert "deepspeed is missing: needed for training. pip install setuptools wheel ninja && pip" in "\n".join(problems)
    assert "wandb is missing: needed for the wandb tracker. pip install -e '.[wandb]'" in problems


def test_facts_and_warnings(monkeypatch):
    facts = dict(system_facts())
    assert {"host", "python", "processor", "disk", "compiler"} == facts.keys()
    monkeypatch.setattr(installation.resource, "getrlimit", lambda which: (256, 256))
    monkeypatch.setattr(installation.os.path, "isdir", lambda path: True)
    monkeypatch.setattr(installation.shutil, "disk_usage", lambda path: type("", (), {"total": 64e6}))
    shared, files, locked = machine_warnings(8)
    assert "/dev/shm has 64 MB" in shared and "--ipc=host" in shared
    assert "only 256 files" in files and "memlock" in locked
