"""The studies that come with megatron_tf: they can run, and their arms can be compared."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run

from megatron_tf.shipped import find_study, shipped_files
from megatron_tf.study.comparable import check_comparable
from megatron_tf.study.file import load_study
from megatron_tf.study.plan import make_plan

PROJECT = Path(__file__).parents[2]
FILES = sorted((PROJECT / "experiments").glob("*.yml"))


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_study_is_whole(file):
    study = load_study(find_study(file.stem))
    plan = make_plan(study)
    check_comparable(plan)
    assert study.name == file.stem and study.dir == f"runs/studies/{file.stem}"
    assert all(node.config.evaluation.samples > 0 for node in plan.nodes)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 130


def test_all_are_found_by_name():
    assert list(shipped_files("experiments", "experiments", ".yml")) == [file.stem for file in FILES]
    assert len(FILES) > 1


def test_the_script_for_slurm_runs_a_study(tmp_path):
    """What it refuses is said, with exit code 2, from any folder."""
    script = PROJECT / "launch" / "slurm" / "study.sbatch"
    done = run(["bash", script, tmp_path / "none.yml"], SLURM_ARRAY_TASK_ID="3", PYTHONPATH=str(PROJECT))
    assert done.returncode == 2 and f"{tmp_path}/none.yml: there is no such file" in done.stdout, done.stdout
