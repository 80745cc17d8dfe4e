"""launch/slurm/preprocess.sbatch as an array on a real SLURM, cut off twice: the files are those of one quiet run."""

from __future__ import annotations

import json
import random
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from launching import PROJECT, run

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.preparation.bpe import train_bpe

pytestmark = [pytest.mark.slow, pytest.mark.scale]

NUM_FILES = 20
DOCUMENTS_PER_FILE = 250
ENDINGS = [f"{split}{suffix}" for split in ("_train", "_validation") for suffix in (".bin", ".idx")]
OPTIONS = "--cpus-per-task=2 --gpus-per-node=0"  # two tasks a node


@pytest.fixture(scope="module")
def cluster(start_cluster):
    return start_cluster(3, 5)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Those of the preparation but for its output: files of text that take about a second each."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 12))) for _ in range(20_000)]
    texts = [" ".join(generator.choices(words, k=600)) for _ in range(DOCUMENTS_PER_FILE)]
    for number in range(NUM_FILES):
        lines = (json.dumps({"text": f"{number}.{place} {text}"}) for place, text in enumerate(texts))
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines))
    train_bpe(texts[:20], 4000, folder / "tokenizer.json")
    return ["--input", f"{folder}/*.jsonl", "--tokenizer", f"{folder}/tokenizer.json", "--validation-fraction", "0.05"]


class Array:
    """A submitted array, or without `tasks` the job that merges."""

    def __init__(self, cluster, tasks: str, arguments: list[str], prefix: Path):
        self.cluster = cluster
        options = f"{OPTIONS} --array={tasks}" if tasks else OPTIONS
        words = [*arguments, "--output-prefix", prefix]
        self.job = cluster.submit(*words, options=options, script="preprocess.sbatch")

    def states(self) -> list[str]:
        return self.cluster.state(self.job).split()

    def is_over(self) -> bool:
        return not {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING"} & set(self.states())

    def running_on(self) -> list[str]:
        """The nodes of the tasks that run."""
        return self.cluster.run(f"squeue -h -j {self.job} -t RUNNING -o %N").split()

    def until_finished(self, prefix: Path, parts: int) -> None:
        self.cluster.until(lambda: len(finished(prefix)) >= parts or self.is_over(), job=self.job)
        assert len(finished(prefix)) >= parts, self.cluster.report(self.job)

    def wait(self) -> None:
        self.cluster.until(self.is_over, job=self.job)


def finished(prefix: Path) -> dict[str, int]:
    """The reports of the parts that are finished, and when each was written."""
    times = {}
    for path in Path(f"{prefix}.parts").glob("*.json"):
        # the last task of an array takes them away
        with suppress(FileNotFoundError):
            times[path.name] = path.stat().st_mtime_ns
    return times


def test_an_array_cut_off_twice_writes_what_one_quiet_run_writes(cluster, arguments, tmp_path):
    prefix = tmp_path / "array"
    first = Array(cluster, "0-5", arguments, prefix)
    first.until_finished(prefix, 3)
    cluster.run(f"scancel {first.job}")
    first.wait()
    before = finished(prefix)
    assert set(first.states()) == {"CANCELLED"} and 3 <= len(before) < NUM_FILES
    assert not Path(f"{prefix}_train.idx").exists()

    second = Array(cluster, "10-14", arguments, prefix)  # of another size, from another index on
    second.until_finished(prefix, len(before) + 3)
    cut = second.running_on()[0]
    cluster.cut_power(cut)
    still_there = finished(prefix)
    assert before.items() <= still_there.items() and len(still_there) < NUM_FILES
    second.wait()  # the tasks of the lost node have been queued again and run on another
    assert set(second.states()) == {"COMPLETED"}, cluster.report(second.job)
    assert cut not in cluster.run(f"squeue -h -j {second.job} -t all -o %N").split()
    cluster.power_on(cut)

    merged = Path(f"{prefix}_train.bin").stat().st_mtime_ns  # by the task that was the last
    merge = Array(cluster, "", arguments, prefix)
    cluster.wait(merge.job)
    assert Path(f"{prefix}_train.bin").stat().st_mtime_ns == merged
    quiet = run(
        [sys.executable, PROJECT / "tools" / "preprocess_data.py", *arguments, "--output-prefix", tmp_path / "quiet"]
    )
    assert quiet.returncode == 0, quiet.stdout
    for ending in ENDINGS:
        assert Path(f"{prefix}{ending}").read_bytes() == Path(f"{tmp_path}/quiet{ending}").read_bytes(), ending
    counts = [IndexedDataset(f"{prefix}{split}").num_documents for split in ("_train", "_validation")]
    assert sum(counts) == NUM_FILES * DOCUMENTS_PER_FILE and min(counts) > 0
    assert not Path(f"{prefix}.parts").exists()


def test_a_merge_too_early_names_what_is_missing(cluster, arguments, tmp_path):
    merge = Array(cluster, "", arguments, tmp_path / "early")
    cluster.wait(merge.job, "FAILED")
    assert cluster.exit_code(merge.job) == 2
    assert f"{NUM_FILES} of {NUM_FILES} parts are still to be prepared" in cluster.output(merge.job)
