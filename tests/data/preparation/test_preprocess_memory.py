"""Memory of a preparation, as the system counts it, with documents far larger than usual."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from peak_memory import counted_from_zero

from megatron_tf.data.preparation.bpe import train_bpe

LARGE = (pytest.mark.slow, pytest.mark.scale)


@pytest.mark.parametrize(
    ("megabytes", "workers"),
    [(4, 1), pytest.param(20, 1, marks=LARGE), pytest.param(20, 2, marks=LARGE)],
)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory")
def test_a_large_document_takes_memory_in_proportion(tmp_path, megabytes, workers):
    """Beyond what the program takes without it: 4 bytes a byte, so that 1 GB takes 4 GB, and a piece while encoded."""
    base, peak = (peak_bytes(tmp_path / str(size), size, workers) for size in (10_000, megabytes * 10**6))
    assert peak - base < 4 * megabytes * 10**6 + (64 << 20)


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zst"])
def test_a_document_of_a_gigabyte_is_passed_over_in_little_memory(tmp_path, name):
    assert peak_bytes(tmp_path, 10**9, 2, name) < 1 << 30
    report = json.loads((tmp_path / "x.report.json").read_text())
    assert (report["documents"], report["skipped"]) == (1, {"too_long": 1})


def peak_bytes(folder: Path, size: int, workers: int, name: str = "a.txt") -> int:
    """Of the largest process that prepares a document of `size` bytes, and a small one."""
    folder.mkdir(exist_ok=True)
    (folder / "small.txt").write_text("small")
    sentence = b"The quick brown fox jumps over the lazy dog. "
    if name.endswith(".zst"):
        zstandard = pytest.importorskip("zstandard")
        with open(folder / name, "wb") as file, zstandard.ZstdCompressor().stream_writer(file) as out:
            out.write(b'{"text": "')
            for _ in range(size // len(sentence)):
                out.write(sentence)
            out.write(b'"}')
    else:
        with open(folder / name, "wb") as file:
            for _ in range(size // len(sentence)):
                file.write(sentence)
    train_bpe([sentence.decode() * 5], 300, folder / "t.json")  # about 4 bytes a token, as large vocabularies have
    code = f"""
import resource, sys
from megatron_tf.data.preparation.lanes import share_workers
from megatron_tf.data.preparation.preprocess import PreprocessSettings, merge_shards, preprocess
from megatron_tf.data.preparation.progress import ProgressDisplay
if __name__ == "__main__":
    inputs = ({str(folder / name)!r}, {str(folder / "small.txt")!r})
    settings = PreprocessSettings(inputs, {str(folder / "t.json")!r}, {str(folder / "x")!r}, workers={workers},
                                  on_error="skip")
    preprocess(settings, ProgressDisplay(sys.stderr))
    print(max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""
    (folder / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = counted_from_zero([sys.executable, folder / "script.py"])
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024
