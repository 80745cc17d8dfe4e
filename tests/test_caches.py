"""Cache folders that cannot be written, or that a user without a home folder does not have."""

from __future__ import annotations

import pwd
import tempfile
from pathlib import Path

import pytest

from megatron_tf import caches
from megatron_tf.caches import prepare_compiler, prepare_hugging_face, prepare_triton, temporary_cache, user_cache

UNWRITABLE = "/proc/none"  # not even for root


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def homeless(monkeypatch):
    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")


def test_a_temporary_cache_is_private_and_the_same_again(temporary):
    assert temporary_cache("one") == temporary_cache("one")
    (root,) = temporary.iterdir()
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o777)  # as one that somebody else has prepared
    assert temporary_cache("one").parent != root


def test_the_users_cache(homeless):
    assert user_cache({}) is None
    assert user_cache({"XDG_CACHE_HOME": "relative"}) is None
    assert user_cache({"XDG_CACHE_HOME": "/somewhere"}) == Path("/somewhere")


def test_hugging_face_at_home_is_left_alone(tmp_path):
    environ = {"HF_HOME": str(tmp_path / "hf")}
    prepare_hugging_face(environ)
    assert environ == {"HF_HOME": str(tmp_path / "hf")}


def test_hugging_face_without_a_home(homeless, caplog):
    environ: dict[str, str] = {}
    prepare_hugging_face(environ)
    assert environ == {"HF_HOME": str(temporary_cache("huggingface"))} and not caplog.records


def test_hugging_face_in_a_folder_that_cannot_be_made(caplog):
    environ = {"HF_HOME": UNWRITABLE}
    prepare_hugging_face(environ)
    assert environ == {"HF_HOME": str(temporary_cache("huggingface"))}
    assert f"HF_HOME={UNWRITABLE} cannot be written" in caplog.text


def test_hugging_face_in_a_folder_that_is_there_to_be_read(tmp_path, monkeypatch):
    """What was downloaded into it is still read; what is made of it goes elsewhere."""
    home = tmp_path / "shared"
    home.mkdir()
    can_write = caches.can_write
    monkeypatch.setattr(caches, "can_write", lambda folder: home not in (folder, folder.parent) and can_write(folder))
    environ = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    prepare_hugging_face(environ)
    assert environ["HF_HOME"] == str(home) and environ["HF_MODULES_CACHE"] == str(tmp_path / "modules")
    assert environ["HF_DATASETS_CACHE"] == str(temporary_cache("huggingface-datasets"))


def test_compilers(homeless, caplog):
    environ = {"TORCHINDUCTOR_CACHE_DIR": UNWRITABLE}
    prepare_compiler(environ)
    prepare_triton(environ)
    assert environ["TORCHINDUCTOR_CACHE_DIR"] == str(temporary_cache("inductor"))
    assert environ["TRITON_CACHE_DIR"] == str(temporary_cache("triton"))
    assert f"TORCHINDUCTOR_CACHE_DIR={UNWRITABLE} cannot be written" in caplog.text


def test_compilers_with_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    environ: dict[str, str] = {}
    prepare_compiler(environ)
    prepare_triton(environ)
    assert environ == {}
