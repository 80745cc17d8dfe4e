"""The data tools as commands: corpus, tokenizer and token files in a row, and a user's mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS, until
from tooling import tool

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.summary import read_summary
from megatron_tf.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return tool(name.removesuffix(".py"), *arguments)


def test_corpus_tokenizer_and_data_in_a_row(tmp_path):
    built = run("build_demo_corpus.py", tmp_path, "--max-megabytes", "1")
    assert built.returncode == 0, built.stderr
    trained = run(
        "train_tokenizer.py", "--input", tmp_path / "train.jsonl.zst", "--vocab-size", "400", "--output",
        tmp_path / "tokenizer.json",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    prepared = run(
        "preprocess_data.py", "--input", tmp_path / "*.jsonl.zst", "--tokenizer", tmp_path / "tokenizer.json",
        "--output-prefix", tmp_path / "data" / "demo", "--workers", "2",
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    assert "documents (" in prepared.stderr and "MB/s" in prepared.stderr
    dataset, summary = IndexedDataset(tmp_path / "data" / "demo"), read_summary(tmp_path / "data" / "demo")
    assert (summary.documents, summary.tokens) == (dataset.num_documents, dataset.num_tokens)
    first = load_tokenizer(tmp_path / "tokenizer.json").decode(dataset.tokens(0, dataset.document_offsets[1]).tolist())
    assert 'The "assert" statement' in first and first.endswith("<|endoftext|>")


@pytest.mark.parametrize("tool", ["preprocess_data.py", "train_tokenizer.py", "build_demo_corpus.py"])
def test_help(tool):
    shown = run(tool, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage:")


def test_bad_record_is_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    trained = run("train_tokenizer.py", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "t.json")
    assert (trained.returncode, trained.stdout) == (2, "")
    assert trained.stderr.startswith(f"error: {tmp_path}/in.jsonl:2: invalid JSON") and trained.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_lost_characters_end_the_run_or_are_counted_and_the_end_of_documents_has_a_name(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(special_tokens=["<|endoftext|>", "<end>"], show_progress=False)
    tokenizer.train_from_iterator(["the fox"], trainer)
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "in.jsonl").write_text('{"text": "the fox"}\n{"text": "the 日本 fox 日"}\n')
    command = ["preprocess_data.py", "--input", tmp_path / "in.jsonl", "--tokenizer", tmp_path / "t.json",
               "--output-prefix", tmp_path / "out" / "x", "--eod-token", "<end>"]  # fmt: skip
    refused = run(*command)
    assert refused.returncode == 2 and "loses 3 characters ('日' 2, '本' 1) of it. Use a tokenizer" in refused.stderr
    assert not list((tmp_path / "out").iterdir())
    kept = run(*command, "--keep-lossy")
    assert kept.returncode == 0, kept.stderr
    assert "changes text: 'Éa  b" in kept.stderr
    said = "x: the tokenizer has no token for 3 characters ('日' 2, '本' 1) of 1 document, which are lost, see "
    assert said + f"{tmp_path}/out/x.report.json" in kept.stderr
    summary, report = read_summary(tmp_path / "out" / "x"), json.loads((tmp_path / "out" / "x.report.json").read_text())
    assert (summary.documents, summary.eod_id, summary.lost_characters) == (2, 1, 3)
    assert (report["lost_characters"], report["lost"], report["kept"]) == (3, {"日": 2, "本": 1}, {"lost_text": 1})
    assert [(sample["file"], sample["line"]) for sample in report["kept_samples"]] == [(f"{tmp_path}/in.jsonl", 2)]
    assert said in run(*command, "--keep-lossy").stderr
    other_end = run(*command[:-2], "--keep-lossy")
    assert other_end.returncode == 2 and "not what these inputs and settings give" in other_end.stderr


def test_missing_tokenizer_is_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "in.txt").write_text("text")
    failed = run(
        "preprocess_data.py", "--input", tmp_path / "in.txt", "--tokenizer", tmp_path / "t.json",
        "--output-prefix", tmp_path / "out" / "x",
    )  # fmt: skip
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(
        f"error: {tmp_path}/t.json: No such file or directory. The tokenizer cannot be read"
    )
    assert not (tmp_path / "out").exists()


def test_links_and_wrong_names(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "c4.json.gz").write_text('{"text": "one"}\n')  # unpacked on its way
    (tmp_path / "in" / "again").symlink_to(".")
    (tmp_path / "in" / "link.jsonl").symlink_to("c4.json.gz")
    common = ["--tokenizer", "bytes", "--output-prefix", tmp_path / "x", "--input"]
    prepared = run("preprocess_data.py", *common, f"{tmp_path}/in/**/*")
    assert prepared.returncode == 0 and f"{tmp_path}/x: 1 document, 4 tokens" in prepared.stdout, prepared.stderr
    assert prepared.stderr.startswith(
        f"{tmp_path}/in/link.jsonl is the file {tmp_path}/in/c4.json.gz, which is read once"
    )
    (tmp_path / "in" / "gone.jsonl").symlink_to("nowhere")
    refused = run("preprocess_data.py", *common, f"{tmp_path}/in/**/*")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"error: {tmp_path}/in/gone.jsonl: is a link to nowhere, and nothing is there.")


def write_shards(folder: Path, number: int, documents: int) -> str:
    """Files of some megabytes, each different; returns a glob of them."""
    folder.mkdir()
    for index in range(number):
        lines = (
            json.dumps({"text": f"Document {index} {line} says so. " * (50 + line % 40)}) for line in range(documents)
        )
        (folder / f"{index}.jsonl").write_text("\n".join(lines))
    return str(folder / "*.jsonl")


def array_task(task: int | None, *arguments: str | Path) -> subprocess.Popen[str]:
    """The batch script as SLURM starts it for one task of an array of two; as a job of its own for None."""
    variables = {} if task is None else {"ID": task + 1, "MIN": 1, "COUNT": 2}  # an array may start anywhere
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": "2",
        **{f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in variables.items()},
    }  # fmt: skip
    script = ["bash", str(ROOT / "launch" / "slurm" / "preprocess.sbatch")]
    return subprocess.Popen(
        [*script, *map(str, arguments)], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finished_parts(folder: Path) -> dict[str, int]:
    """Time of the last change of each finished part's files."""
    keys = {path.stem for path in folder.glob("*.json")}
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*") if path.stem in keys}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds child processes in /proc")
def test_array_cut_off_twice_equals_the_undisturbed_run(tmp_path):
    inputs = write_shards(tmp_path / "in", 8, 2500)
    common = ["--input", inputs, "--tokenizer", "bytes", "--validation-fraction", "0.1", "--output-prefix"]
    whole = run("preprocess_data.py", *common, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "x.parts"
    kept: dict[str, int] = {}
    for goal in (1, 2):  # cut off in the second part, then in the third of its four
        task = array_task(0, *common, tmp_path / "x")
        until(
            lambda goal=goal: len(list(folder.glob("*.json"))) >= goal and any(map(size, folder.glob("*.partial"))),
            f"part {goal + 1} was half written",
            pause=0.002,
        )
        helpers = Path(f"/proc/{task.pid}/task/{task.pid}/children").read_text().split()
        task.send_signal(signal.SIGKILL)
        task.communicate()
        assert task.returncode == -signal.SIGKILL
        until(lambda helpers=helpers: not any(map(running, helpers)), "the workers were gone")
        assert list(folder.glob("*.partial")), "it had ended before it was cut off"
        now = finished_parts(folder)
        assert kept.items() <= now.items()
        kept = now
    shown = [array_task(number, *common, tmp_path / "x").communicate(timeout=PATIENCE_SECONDS) for number in (0, 1)]
    assert re.search(r"finished before: [1-4] of 4 parts", shown[0][1]) and "4 of 8 parts are still" in shown[0][1]
    merged, _ = array_task(None, *common, tmp_path / "x").communicate(timeout=PATIENCE_SECONDS)
    assert f"{tmp_path}/x_train: " in merged and merged == shown[1][0]
    for name in ("_train.bin", "_train.idx", "_train.json", "_validation.bin", "_validation.idx", "_validation.json"):
        assert (tmp_path / f"x{name}").read_bytes() == (tmp_path / f"whole{name}").read_bytes(), name
    assert not folder.exists()


def size(path: Path) -> int:
    """Bytes of a file that another process writes; 0 when it has been given its final name meanwhile."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_control_c_is_quiet_and_resumes(tmp_path):
    inputs = write_shards(tmp_path / "in", 40, 2500)
    arguments = ["--input", inputs, "--tokenizer", "bytes", "--output-prefix", tmp_path / "x", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: any((tmp_path / "x.parts").glob("*.json")), "a part was finished", pause=0.002)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    _, errors = started.communicate(timeout=PATIENCE_SECONDS)
    assert started.returncode == 130 and "Traceback" not in errors, errors
    resumed = run("preprocess_data.py", *arguments)
    assert resumed.returncode == 0 and re.search(r"finished before: \d+ of 40 parts", resumed.stderr), resumed.stderr
    assert IndexedDataset(tmp_path / "x").num_documents == 100_000


@pytest.mark.parametrize("shards", [4, 8], ids=["a worker of a pool", "a lane"])
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1])
def test_control_c_while_workers_start(tmp_path, delay, shards):
    inputs = write_shards(tmp_path / "in", shards, 2500)
    arguments = ["--input", inputs, "--tokenizer", "bytes", "--output-prefix", tmp_path / "x", "--workers", "2"]
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    until(lambda: len(children.read_text().split()) >= 2, "a worker and Python's resource tracker ran", pause=0.002)
    time.sleep(delay)
    os.killpg(started.pid, signal.SIGINT)
    _, errors = started.communicate(timeout=PATIENCE_SECONDS)
    assert started.returncode == 130 and "Traceback" not in errors, errors


def test_a_batch_script_has_no_mistakes_of_the_shell(tmp_path):
    script = ROOT / "launch" / "slurm" / "preprocess.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    failed = array_task(1, "--input", tmp_path / "no.txt", "--tokenizer", "bytes", "--output-prefix", tmp_path / "x")
    output, errors = failed.communicate(timeout=PATIENCE_SECONDS)
    assert (failed.returncode, output) == (2, "") and errors.startswith(f"error: {tmp_path}/no.txt: no such file")


def test_a_batch_script_without_the_environment_of_its_user(tmp_path):
    """As with --export=NONE: neither PATH nor HOME, and no Python that knows the project."""
    script = ROOT / "launch" / "slurm" / "preprocess.sbatch"
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\nif [ "$1" = -c ]; then exit $LACKS; fi\necho "$HOME" "$(env | grep ^PATH)" "$@"\n')
    python.chmod(0o755)

    def submitted(**variables):
        return subprocess.run(["/bin/bash", script, "--input", "x"], env=variables, capture_output=True, text=True)

    for variables in ({}, {"PYTHON": "/no/such/python"}, {"PYTHON": str(python), "LACKS": "1"}):
        refused = submitted(**variables, HOME="/h", PATH="/nowhere")
        assert (refused.returncode, refused.stdout) == (2, "")
        name = variables.get("PYTHON", "python")
        assert refused.stderr.startswith(f"error: {name} cannot be run, or lacks megatron_tf. Submit"), refused.stderr
    array = {"ID": "7", "MIN": "3", "COUNT": "4", "STEP": "2"}
    task = submitted(
        PYTHON=str(python), LACKS="0", **{f"SLURM_ARRAY_TASK_{name}": value for name, value in array.items()}
    )
    home, path, *words = task.stdout.split()
    assert home.startswith("/") and path.startswith("PATH=/"), task.stderr
    assert " ".join(words) == "-m megatron_tf preprocess --input x --workers 1 --shard-index 2 --num-shards 4"


@pytest.mark.timing
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["tokenizers", "sentencepiece", "tiktoken"])
@pytest.mark.parametrize("workers", [1, 2])
def test_throughput_against_the_bare_library(tmp_path, kind, workers):
    """At least 0.9 times processes times what the library does in one, on the same text, measured in turns."""
    command = [sys.executable, str(ROOT / "tests" / "data" / "preprocess_speed.py"), str(tmp_path), kind, str(workers)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio"] >= 0.9, done.stdout
