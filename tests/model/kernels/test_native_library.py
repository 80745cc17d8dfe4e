"""Building a C file where the compiler, the cache folder and the folder for temporary files are not as one would
like."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.model.kernels import native_library
from megatron_tf.model.kernels.native_library import BuildError, load_library

FLAGS = ("-shared", "-fPIC")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A C file with a function that returns 42; an empty cache folder."""
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    return path


@pytest.fixture
def builds(monkeypatch):
    """The commands that were run."""
    commands = []
    run = subprocess.run
    monkeypatch.setattr(native_library.subprocess, "run", lambda *a, **k: commands.append(a[0]) or run(*a, **k))
    return commands


def kept(source: Path) -> list[Path]:
    return sorted((source.parent / "cache" / "megatron_tf").iterdir())


def test_it_is_built_once(source, builds):
    for _ in range(2):
        assert load_library(source, FLAGS).answer() == 42
    assert len(builds) == 1 and len(kept(source)) == 1


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, 100), lambda path: path.write_bytes(b""),
                                    lambda path: os.truncate(path, path.stat().st_size - 1)])  # fmt: skip
def test_one_that_is_half_written_is_built_again(source, builds, damage):
    load_library(source, FLAGS)
    (path,) = kept(source)
    whole = path.read_bytes()
    path.unlink()  # not changed in place: this process has loaded it
    path.write_bytes(whole)
    damage(path)
    assert load_library(source, FLAGS).answer() == 42
    assert len(builds) == 2 and path.read_bytes() == whole


def test_one_that_the_system_does_not_load_is_built_again(source, builds, monkeypatch):
    """As one in a shared home folder that another system has built, or in a folder from which nothing may be run."""
    load_library(source, FLAGS)
    load = ctypes.CDLL

    def refuse(path):
        if "cache" in path:
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native_library.ctypes, "CDLL", refuse)
    assert load_library(source, FLAGS).answer() == 42 and len(builds) == 2


def test_a_folder_for_temporary_files_that_is_not_for_programs(source, monkeypatch):
    load = ctypes.CDLL

    def refuse(path):
        if "cache" not in path:
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native_library.ctypes, "CDLL", refuse)
    assert load_library(source, FLAGS).answer() == 42


def test_without_a_folder_for_temporary_files(source, monkeypatch):
    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert load_library(source, FLAGS).answer() == 42
    assert len(kept(source)) == 1


@pytest.mark.parametrize("place", ["", "relative", "/proc/none", "a file"])
def test_a_cache_that_cannot_be_written(source, builds, monkeypatch, place):
    monkeypatch.chdir(source.parent)
    (source.parent / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / place) if place == "a file" else place)
    monkeypatch.setenv("HOME", "/proc/none")
    monkeypatch.setattr(tempfile, "tempdir", str(source.parent))
    for _ in range(2):
        assert load_library(source, FLAGS).answer() == 42
    assert len(builds) == 1 and not (source.parent / "relative").exists()


def test_without_any_cache(source, builds, monkeypatch):
    def none(name):
        raise PermissionError(name)

    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    monkeypatch.setattr(native_library, "temporary_cache", none)
    for _ in range(2):
        assert load_library(source, FLAGS).answer() == 42
    assert len(builds) == 2


def test_a_user_without_a_home_folder_and_a_name(source, monkeypatch):
    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert load_library(source, FLAGS).answer() == 42


def test_a_compiler_with_arguments(source, builds, monkeypatch):
    compiler = shutil.which("cc") or shutil.which("gcc")
    for words in (f"{compiler} -O1", f"env '{compiler}'"):
        monkeypatch.setenv("CC", words)
        assert load_library(source, FLAGS).answer() == 42
    monkeypatch.setenv("CC", "  ")
    assert load_library(source, FLAGS).answer() == 42
    assert len(builds) == 3


@pytest.mark.parametrize(("words", "reason"), [("gcc '", "CC=gcc ' cannot be read: No closing quotation"),
                                               ("no-such-compiler -m64", "no-such-compiler"),
                                               ("false", "false could not build it")])  # fmt: skip
def test_a_compiler_that_cannot_build_it(source, monkeypatch, words, reason):
    monkeypatch.setenv("CC", words)
    with pytest.raises(BuildError, match=reason):
        load_library(source, FLAGS)


def test_processes_that_build_at_once(source):
    script = (
        f"import pathlib, runpy, sys; load = runpy.run_path({native_library.__file__!r})['load_library']\n"
        f"sys.exit(load(pathlib.Path({str(source)!r}), {FLAGS!r}).answer())"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(4)]
    assert [process.wait(PATIENCE_SECONDS) for process in processes] == [42] * 4
    assert len(kept(source)) == 1
