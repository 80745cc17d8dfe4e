"""`pip install .` gives every command, configuration and SLURM script, in any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` of an environment into which a wheel was installed. Other packages come from this environment."""
    root = tmp_path_factory.mktemp("installed")
    source = root / "source"
    for name in ("megatron_tf", "configs", "experiments", "launch"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(PROJECT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", root, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    wheel = next(root.glob("*.whl"))
    subprocess.run([*pip, "--python", root / "venv", "install", "--no-deps", "--no-index", wheel], check=True)
    packages = next((root / "venv" / "lib").glob("*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return root / "venv" / "bin"


def run(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=PATIENCE_SECONDS,
    )  # fmt: skip


@pytest.mark.slow
def test_every_command_configuration_and_script_is_there(installed, tmp_path):
    command = installed / "megatron_tf"
    listed = run(tmp_path, command, "config", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == sorted(
        path.stem for path in (PROJECT / "configs").glob("*.yml")
    )
    assert run(tmp_path, command, "config", "show", "tiny").stdout == (PROJECT / "configs" / "tiny.yml").read_text()
    extended = run(tmp_path, command, "config", "show", "tiny_grow", "--resolved").stdout
    assert "vocab_size: 4096" in extended and "from: runs/tiny" in extended
    schema = run(tmp_path, command, "config", "reference", "--schema").stdout
    assert schema == (PROJECT / "configs" / "schema.json").read_text()
    for name in ("train", "preprocess", "study"):
        script = PROJECT / "launch" / "slurm" / f"{name}.sbatch"
        assert run(tmp_path, command, "sbatch", name).stdout == script.read_text()
    modules = {path.stem for path in (PROJECT / "megatron_tf" / "commands").glob("[!_]*.py")}
    assert {path.stem for path in installed.parent.glob("lib/*/site-packages/megatron_tf/commands/[!_]*.py")} == modules
    helped = run(tmp_path, installed / "python", "-m", "megatron_tf", "verify", "resume", "--help")
    assert helped.stdout.startswith("usage: megatron_tf verify-resume ")
    wrong = run(tmp_path, command, "trian")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: 'trian' is no command. Choose one of train,")
    planned = run(tmp_path, command, "study", "plan", "growth_tiny", "--flops-per-second", "1e9", "--workers", "1")
    assert "12 runs, 12 of them left" in planned.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_text_is_prepared_and_a_shipped_configuration_trained(installed, tmp_path):
    command = installed / "megatron_tf"
    (tmp_path / "a.txt").write_text("To be, or not to be, that is the question. " * 60)
    prepared = run(tmp_path, command, "preprocess", "--input", "a.txt", "--tokenizer", "bytes", "--output-prefix", "a")
    assert prepared.returncode == 0, prepared.stderr
    small = ["data={tokenizer: bytes, train: [{path: a}]}", "evaluation.interval_steps=null",
             "model.num_layers=1", "training.train_steps=1", "optimizer.schedule.warmup_steps=0"]  # fmt: skip
    # one rank: tests/launch/test_train.py starts two, of which each imports everything
    launcher = [installed / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"]
    trained = run(tmp_path, *launcher, "megatron_tf", "train", "tiny", *small)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    written = run(tmp_path, command, "generate", "runs/tiny", "--prompt", "To", "--tokens", "3")
    assert written.returncode == 0 and written.stdout.startswith("To"), written.stderr
