"""What decides what a rank computes, in addition to its configuration and its data."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch

from megatron_tf.diagnosis.software import code_digest, software_facts


def test_code_libraries_and_variables():
    environ = {"MEGATRON_TF_NATIVE": "0", "NCCL_ALGO": "Ring", "NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "3"}
    facts = software_facts(environ)
    assert facts["torch"] == torch.__version__ and facts["Python"] == platform.python_version()
    assert facts["deepspeed"] == metadata.version("deepspeed")
    assert facts["the code of megatron_tf"] == f"SHA-256 {code_digest()[:12]}"
    assert {name: facts[name] for name in facts if name.isupper()} == {"MEGATRON_TF_NATIVE": "0", "NCCL_ALGO": "Ring"}


def test_a_library_that_is_imported_counts_before_one_that_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", type(sys)("numpy"))
    monkeypatch.setattr(sys.modules["numpy"], "__version__", "0.1", raising=False)
    assert software_facts({})["numpy"] == "0.1"
    monkeypatch.delattr(sys.modules["numpy"], "__version__")

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", nothing)
    assert software_facts({})["numpy"] == "not installed"


def test_the_digest_of_code(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "inner" / "b.c").write_text("int x;\n")
    digests = [code_digest(tmp_path)]
    (tmp_path / "notes.txt").write_text("no code")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.pyc").write_bytes(b"compiled")
    assert code_digest(tmp_path) == digests[0]
    for change in (
        lambda: (tmp_path / "a.py").write_text("x = 2\n"),
        lambda: (tmp_path / "inner" / "b.c").write_text("int y;\n"),
        lambda: (tmp_path / "a.py").rename(tmp_path / "c.py"),
    ):
        change()
        digests.append(code_digest(tmp_path))
    assert len(set(digests)) == 4
