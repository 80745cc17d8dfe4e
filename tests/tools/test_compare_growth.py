from __future__ import annotations

import json
import subprocess

import pytest
from tooling import assert_refused, tool

from megatron_tf.commands import compare_growth
from megatron_tf.errors import UserError
from megatron_tf.telemetry.plot import plot_groups, read_run


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


def test_table(groups):
    head, grown, scratch = compare_growth.table(groups).splitlines()
    assert head.split()[:5] == ["tokens", "FLOPs", "before", "after", "end"]
    assert grown.split() == ["zero_key", "200", "2.00e+03", "4.5000", "4.5000", "3.5000", "3.0000,", "4.0000"]
    assert scratch.split() == ["from", "scratch", "200", "2.00e+03", "-", "-", "3.5000", "3.5000,", "3.5000"]


def test_picture(groups, tmp_path):
    plot_groups(groups, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


MODEL = "num_layers: 1, hidden_size: 16, num_attention_heads: 2, seq_length: 16, vocab_size: 32"
CONFIG = """
run: {{name: x, dir: runs/x}}
model: {{{model}, parameter_tokens: {{qkv: {count}, proj: {count}, ffn: {count}}}}}
training: {{train_steps: 4, global_batch_size: 2, micro_batch_size: 1, precision: fp32}}
optimizer: {{lr: 1e-3, schedule: {{warmup_steps: 1}}}}
data: {{train: [{{path: {data}}}], validation: [{{path: {data}}}]}}
"""


@pytest.fixture
def configs(tmp_path):
    for ending in ("bin", "idx"):
        (tmp_path / f"text.{ending}").touch()
    for name, count in (("small", 8), ("big", 16)):
        text = CONFIG.format(model=MODEL, count=count, data=tmp_path / "text")
        (tmp_path / f"{name}.yml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["--methods", "foo"], "invalid choice: 'foo'"),
        (["--methods", "gram", "gram"], "--methods: gram is there twice"),
        (["--ranks", "0"], "'0' is not a whole number from 1 to 256"),
        (["--ranks", "3"], "--small: training.global_batch_size: 2 is not a multiple of 3"),
        (["--seeds", "-1"], "'-1' is not a whole number from 0"),
        (["--seeds", "x"], "'x' is not a whole number"),
        (["--seeds", "1", "2", "1"], "--seeds: 1 is there twice"),
        (["--output", "{folder}/small.yml"], "small.yml is a file. Give a folder."),
        (["--output", ""], "'' is no path"),
        (["--small", "{folder}/big.yml", "--big", "{folder}/small.yml"], "16 before, 8 after. Growth cannot take"),
        (["--small", "{folder}/no.yml"], "no.yml"),
    ],
)
def test_everything_is_refused_before_a_run_starts(configs, words, fragment):
    files = ["--small", configs / "small.yml", "--big", configs / "big.yml", "--output", configs / "out"]
    done = tool("compare_growth", *files, *(word.format(folder=configs) for word in words))
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1 and fragment in done.stderr, done.stderr
    assert not (configs / "out").exists()


def test_a_method_that_cannot_grow_this_model_is_refused(configs):
    (configs / "big.yml").write_text((configs / "big.yml").read_text().replace("qkv: 16", "qkv: 9"))
    files = ["--small", configs / "small.yml", "--big", configs / "big.yml", "--output", configs / "out"]
    assert_refused(tool("compare_growth", *files), "--methods gram: ", "gram needs at least 8 new qkv tokens")


def test_good_input_is_not_refused(configs, monkeypatch):
    """As far as the first command, which is not run."""
    started = []
    monkeypatch.setattr(compare_growth.subprocess, "run", lambda words: started.append(words) or _ended(3))
    monkeypatch.setattr(
        "sys.argv", ["x", "--small", f"{configs}/small.yml", "--big", f"{configs}/big.yml", "--seeds", "0"]
    )
    with pytest.raises(UserError, match="start this comparison again"):
        compare_growth.main()
    assert len(started) == 1 and "run.seed=0" in started[0]


def _ended(code):
    return subprocess.CompletedProcess([], code)
