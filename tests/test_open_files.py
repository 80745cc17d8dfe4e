"""How many files may be open: the limit is raised, few are held, and too few is a message that helps."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from megatron_tf import open_files
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.loader import build_dataset
from megatron_tf.errors import DataError, run_command
from tests.launching import PROJECT


def open_now() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def sources(tmp_path) -> list[DataSource]:
    for number in range(30):
        with IndexedWriter(tmp_path / f"s{number}", 300) as writer:
            writer.add_document(np.arange(200))
    return [DataSource(path=str(tmp_path / f"s{number}")) for number in range(30)]


def test_a_source_holds_one_descriptor(sources):
    before = open_now()
    blend = build_dataset(sources, 64, 1, 300)
    assert open_now() - before <= len(sources)
    assert all(source.dataset.document_offsets.tolist() == [0, 200] for source in blend.sources)
    assert open_now() - before <= len(sources)
    assert blend.sample(0).size == 65
    del blend
    assert open_now() <= before


def test_too_many_say_what_the_limit_is_and_how_to_raise_it(sources):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = open_now() + 10
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        with pytest.raises(
            DataError, match=f"Too many open files. This process may have {few} files open. .*ulimit -n"
        ) as caught:
            build_dataset(sources, 64, 1, 300)
        assert str(caught.value).count("Too many") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_error_without_a_file_is_a_message_as_well(capsys):
    def too_many() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(SystemExit) as end:
        run_command(too_many)
    assert end.value.code == 2
    assert "Too many open files. This process may have" in capsys.readouterr().err
    assert "fs.file-max" in str(open_files.remedy(OSError(errno.ENFILE, "")))
    assert open_files.remedy(OSError(errno.ENOENT, "")) is None


def test_a_command_raises_the_soft_limit_to_the_hard_one():
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100)); from megatron_tf.errors import "
    code += "run_command; run_command(lambda: print(resource.getrlimit(resource.RLIMIT_NOFILE)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert done.stdout == "(100, 100)\n"
