from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PROJECT = Path(__file__).parents[1]
MADE = (".venv/bin/python", "made/.made-by-set-up", "build/lib", "site/index.html", "runs/demo/small/config.yml",
        "runs/demo/grown/x",
        "runs/demo/control/x", "runs/demo/expanded/x", "runs/demo/loss.png", "tests/__pycache__/x.pyc")  # fmt: skip
KEPT = ("runs/tiny/config.yml", "runs/demo/mine/config.yml", "mine/bin/python", "data/demo/train.bin", "megatron_tf/a",
        "launch/a", "tools/a")  # fmt: skip


def test_clean_removes_what_was_made_and_nothing_else(tmp_path):
    for name in (*MADE, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(PROJECT / "Makefile", tmp_path)
    for environment in (".venv", "made", "mine"):
        subprocess.run(["make", "-s", "clean", f"VENV={environment}"], cwd=tmp_path, check=True)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*KEPT, "Makefile"}
