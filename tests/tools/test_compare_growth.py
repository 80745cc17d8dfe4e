from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from tooling import assert_refused, tool

from megatron_tf.telemetry.plot import plot_groups, read_run

TOOL = Path(__file__).parents[2] / "tools" / "compare_growth.py"


@pytest.fixture
def compare_growth():
    spec = importlib.util.spec_from_file_location("compare_growth", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def groups(tmp_path):
    def run(name, grown, points):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yml").write_text(f"growth: {'{from: x}' if grown else 'null'}\n")
        lines = [
            json.dumps({"step": n, "tokens": t, "flops": 10.0 * t, "eval/loss": x}) for n, (t, x) in enumerate(points)
        ]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return read_run(folder)

    small = [run(f"small{seed}", False, [(0, 5.0), (100, 4.0 + seed)]) for seed in (0, 1)]
    grown = [run(f"grown{seed}", True, [(100, 4.0 + seed), (200, 3.0 + seed)]) for seed in (0, 1)]
    scratch = [run(f"scratch{seed}", False, [(0, 5.0), (200, 3.5)]) for seed in (0, 1)]
    return {"zero_key": [list(pair) for pair in zip(small, grown)], "from scratch": [[one] for one in scratch]}


def test_table(compare_growth, groups):
    head, grown, scratch = compare_growth.table(groups).splitlines()
    assert head.split()[:5] == ["tokens", "FLOPs", "before", "after", "end"]
    assert grown.split() == ["zero_key", "200", "2.00e+03", "4.5000", "4.5000", "3.5000", "3.0000,", "4.0000"]
    assert scratch.split() == ["from", "scratch", "200", "2.00e+03", "-", "-", "3.5000", "3.5000,", "3.5000"]


def test_picture(groups, tmp_path):
    plot_groups(groups, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input(tmp_path):
    assert_refused(tool("compare_growth", "--small", tmp_path / "no.yml"), "no.yml")
