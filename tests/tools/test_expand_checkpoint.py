from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import PROJECT, run, train
from prepared import write_tokens
from tooling import tool

from megatron_tf.checkpoint.compare import compare
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.commands.expand_checkpoint import about_width
from megatron_tf.commands.inspect_checkpoint import between
from megatron_tf.state.optimizer_states import STATES, WEIGHT

TOOL = PROJECT / "tools" / "expand_checkpoint.py"
CONFIG = """
run: {{dir: {folder}/small, name: test}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 16
  vocab_size: 99
  parameter_tokens: {{qkv: 13, proj: 11, ffn: 37}}
training: {{train_steps: 2, global_batch_size: 4, micro_batch_size: 2, precision: fp32}}
optimizer: {{lr: 1e-2}}
data:
  train: [{{path: {folder}/tokens}}]
"""
BIGGER = ("model.parameter_tokens.qkv=29", "model.parameter_tokens.ffn=75")
BANK = ("model.parameter_tokens.ffn=69", "model.sparse={ffn: {group_size: 16, candidates: 3, dense: 37}}")
SPLIT = "model.sparse={ffn: {group_size: 16, candidates: 3, dense: 5}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.yml, prepared data and the trained run `small`."""
    folder = tmp_path_factory.mktemp("expand")
    write_tokens(folder / "tokens")
    (folder / "config.yml").write_text(CONFIG.format(folder=folder))
    done = train(folder)
    assert done.returncode == 0, done.stdout
    return folder


@pytest.fixture
def expand(folder, here):
    """expand(target, *arguments) is the tool, from `source` to a bigger model."""

    def run(target: str, *arguments: str, source: str = "small", bigger: Sequence[str] = BIGGER):
        return here("expand_checkpoint", "--from", folder / source, "--config", folder / "config.yml",
                    "--to", folder / target, *bigger, *arguments)  # fmt: skip

    return run


def test_a_dry_run_says_everything_and_writes_nothing(folder, expand):
    done = expand("dry", "growth.from=x", "--dry-run", "growth.methods.ffn=gram")
    assert done.returncode == 0, done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    source = folder / "small" / "checkpoints" / "step_00000002"
    for line in (
        f"from {source}, step 2, 128 tokens",
        f"to {folder}/dry/checkpoints/step_00000000, seed 1234, position 8 in the data",
        "qkv 13 tokens -> 29 by zero_key, τ 3.60555 -> 3.60555",
        "proj 11 tokens, as they are, τ 3.31662 -> 3.31662",
        "ffn 37 tokens -> 75 by gram, τ 6.08276 -> 8.66025",
        "parameters 14,368 -> 25,376",
        "function kept, to rounding",
        "moments of old tokens: keep; of new tokens: 0",
        "dry run: nothing is written",
    ):
        assert line in lines, done.stdout
    (held,) = [line for line in lines if line.startswith("bytes")]
    assert held == f"bytes {sum(f.stat().st_size for f in source.iterdir() if f.name != 'manifest.json'):,} -> 304,512"
    assert not (folder / "dry").exists()


def test_the_growth_says_which_checkpoint_of_the_run(expand):
    done = expand("dry", "growth={from: x, at: before_decay}", "--dry-run")
    assert done.returncode == 2 and "holds the checkpoints of step 2, and a decay began with none" in done.stderr


def test_a_dry_run_of_a_split(expand):
    done = expand("dry", "growth.from=x", "growth.method=split", SPLIT, "--dry-run", bigger=())
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "qkv 13 tokens, as they are, τ 3.60555 -> 3.60555",
        "ffn 37 tokens, copied to 3 candidates in each of 2 slots of 16, τ 6.08276 -> 6.08276",
        "function kept, to rounding",
    ):
        assert line in lines, done.stdout


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        (
            "{group_size: 32, candidates: 3}",
            "the other 37 are no whole slots of model.sparse.ffn.group_size 32 tokens.",
        ),
        ("{group_size: 16, candidates: 3, dense: 60}", "model.sparse.ffn.dense: 60 tokens are used by every position"),
    ],
)
def test_a_model_that_is_not_valid_is_refused_before_anything_is_written(folder, expand, bank, message):
    for more in ((), ("--dry-run",)):
        sparse = f"model.sparse={{ffn: {bank}}}"
        done = expand("invalid", "growth.from=x", "growth.method=split", sparse, *more, bigger=())
        assert done.returncode == 2 and message in done.stderr and "function" not in done.stdout, done.stdout
    assert not (folder / "invalid").exists()


def test_clones_that_never_differ_are_said():
    width = {"from": {"hidden_size": 16}, "to": {"hidden_size": 32}, "clone_noise": 0.1}
    line = "hidden_size 16 -> 32 by cloning; moments of all: 0"
    assert list(about_width(width)) == [line]
    _, warning = about_width({**width, "clone_noise": 0.0})
    assert "growth.clone_noise is 0: clones are alike" in warning


def test_a_change_of_the_function_is_said(expand):
    for override in ("growth.noise=0.02", "growth.methods.qkv=random"):
        done = expand("dry", "growth.from=x", override, "--dry-run")
        assert "function    CHANGED" in done.stdout, done.stdout


def test_a_dry_run_of_a_bank(expand):
    done = expand("dry", "growth.from=x", "growth.method=bank", "--dry-run", bigger=BANK)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    told = "ffn 37 tokens -> 69 by bank, 3 candidates in each of 2 slots of 16, τ 6.08276 -> 6.08276"
    assert told in lines and "function kept, to rounding" in lines, done.stdout


def test_a_split_of_what_was_split_is_told_and_written(folder, expand):
    """The file has what training would begin with: the tests of `growth.split` compare every range of it."""
    assert expand("split", "growth.from=x", "growth.method=split", SPLIT, bigger=()).returncode == 0
    more = SPLIT.replace("candidates: 3", "candidates: 6")
    done = expand("again", "growth.from=x", "growth.method=split", more, source="split", bigger=())
    assert done.returncode == 0, done.stdout
    told = "ffn 37 tokens, 3 candidates copied to 6 candidates in each of 2 slots of 16, τ 6.08276 -> 6.08276"
    assert told in [" ".join(line.split()) for line in done.stdout.splitlines()], done.stdout
    reader = open_checkpoint(folder / "again" / "checkpoints" / "step_00000000")
    before, after = reader.index.growth_history
    assert before["sparse"]["from"] is None and after["sparse"]["from"] == before["sparse"]["to"]
    assert_copies_are_found(folder)
    assert_other_candidates_are_not_compared(folder, expand)
    other = more.replace("candidates: 6", "candidates: 4")
    done = expand("no", "growth.from=x", "growth.method=split", other, source="split", bigger=())
    assert done.returncode == 2 and "3 before, 4 after. Each candidate is split into as many copies" in done.stderr


def assert_copies_are_found(folder: Path) -> None:
    """`inspect --diff` compares each copy with its original, in either direction."""
    small, split, again = (
        open_checkpoint(folder / name / "checkpoints" / step)
        for name, step in (("small", "step_00000002"), ("split", "step_00000000"), ("again", "step_00000000"))
    )
    for one, other in ((small, split), (split, again)):
        for first, second in ((one, other), (other, one)):
            found = {(d.name, d.state): d for d in compare(first, second, between(first.index, second.index)[1])}
            for (name, state), d in found.items():
                # a copy's own part is added to its router
                parted = one is split and name.endswith("bank.router") and state == WEIGHT
                assert d.unequal == (d.compared if parted else 0), d
            for name in ("blocks.0.ffn.bank.key_tokens", "blocks.1.ffn.bank.value_tokens"):
                numel = math.prod(other.index.tensors[name].shape)
                assert {found[name, state].compared for state in STATES} == {numel}


def assert_other_candidates_are_not_compared(folder: Path, expand) -> None:
    """A split into larger candidates of the same tokens holds as many numbers, but of other tokens."""
    larger = SPLIT.replace("group_size: 16", "group_size: 32")
    assert expand("larger", "growth.from=x", "growth.method=split", larger, bigger=()).returncode == 0
    done = tool("inspect_checkpoint", folder / "split", "--diff", folder / "larger")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert done.returncode == 1 and "model.sparse.ffn.group_size 16 / 32" in lines, done.stdout
    assert "blocks.0-1.ffn.bank.key_tokens weight [96, 32] / [96, 32] not compared" in lines, done.stdout
    assert not any(line.startswith("blocks.0-1.attention") for line in lines[lines.index("models differ") :])
    found = json.loads(tool("inspect_checkpoint", folder / "split", "--diff", folder / "larger", "--json").stdout)
    assert found["model_differences"] == {"sparse.ffn.group_size": [16, 32]}
    assert {d["compared"] for d in found["differences"]} == {0}


def assert_alike(source: Path, runs: Path) -> None:
    """Runs grown from the run `source` are equal to the last bit: weights, moments, ages, position."""
    one, other = (open_checkpoint(runs / name / "checkpoints" / "step_00000002") for name in ("inplace", "expanded"))
    assert [d for d in compare(one, other) if not d.equal] == []
    for field in ("samples", "tokens", "scales", "adam_steps", "data", "model"):
        assert getattr(one.index, field) == getattr(other.index, field), field
    *_, entry = other.index.growth_history  # proved at the run's start, as by the trainer's own growth
    assert other.index.growth_history == one.index.growth_history and entry["loss_before"] is not None
    assert entry["source"] == str(open_checkpoint(source / "checkpoints" / "step_00000002").path)


@pytest.mark.slow
def test_training_goes_on_as_if_it_had_grown_the_model_itself(folder, tmp_path):
    bigger = (*BIGGER, f"growth.from={folder}/small", "growth.method=zero_key")
    (tmp_path / "config.yml").write_text((folder / "config.yml").read_text())
    done = train(tmp_path, f"run.dir={tmp_path}/inplace", *bigger)
    assert done.returncode == 0, done.stdout
    done = run([sys.executable, TOOL, "--from", folder / "small", "--config", folder / "config.yml", "--to",
                tmp_path / "expanded", *bigger])  # fmt: skip
    assert done.returncode == 0 and "wrote" in done.stdout, done.stdout
    done = train(tmp_path, f"run.dir={tmp_path}/expanded", *bigger)
    assert done.returncode == 0, done.stdout
    assert "resumed from" in done.stdout and "grown from" not in done.stdout.split("resumed from")[1]
    assert_alike(folder / "small", tmp_path)


GROWTHS = {
    "gram": (*BIGGER, "growth.method=gram", "growth.moments=reset"),
    "random": (*BIGGER, "growth.method=random", "growth.noise=0.02"),
    "matched": (*BIGGER, "growth.method=matched", "growth.noise=0.02"),
    "bank": ("growth.method=bank", *BANK),
    "split": ("growth.method=split", SPLIT),
    # of what the line above has trained
    "split again": ("growth.method=split", SPLIT.replace("candidates: 3", "candidates: 6")),
}
# One process for all runs: only the first pays for the start.
ALL_GROWTHS = """
import json, sys
from megatron_tf import train
from megatron_tf.commands.expand_checkpoint import main
folder, runs, growths = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, growth in growths.items():
    source = f"{runs}/split/inplace" if name == "split again" else f"{folder}/small"
    overrides = [f"growth.from={source}", *growth]
    train(f"{folder}/config.yml", [f"run.dir={runs}/{name}/inplace", *overrides])
    expanded = f"{runs}/{name}/expanded"
    sys.argv = ["expand", "--from", source, "--config", f"{folder}/config.yml", "--to", expanded, *overrides]
    main()
    print("expanded", name)
    train(f"{folder}/config.yml", [f"run.dir={expanded}", *overrides])
    print("went on", name)
"""


@pytest.mark.slow
def test_so_it_does_by_every_other_method(folder, tmp_path):
    (tmp_path / "script.py").write_text(ALL_GROWTHS)
    done = run([sys.executable, tmp_path / "script.py", folder, tmp_path, json.dumps(GROWTHS)])
    assert done.returncode == 0, done.stdout
    for name in GROWTHS:
        _, _, after = done.stdout.partition(f"expanded {name}\n")
        printed, went_on, _ = after.partition(f"went on {name}\n")
        assert went_on and "resumed from" in printed and "grown from" not in printed.split("resumed from")[1]
        assert_alike(tmp_path / "split" / "inplace" if name == "split again" else folder / "small", tmp_path / name)


def test_data_that_is_elsewhere_is_taken_to_be_the_same(folder, expand):
    done = expand("elsewhere", "data.train=[{path: /nowhere/tokens}]")
    assert done.returncode == 0 and "data        not here" in done.stdout, done.stdout
    index = open_checkpoint(folder / "elsewhere" / "checkpoints" / "step_00000000").index
    source = open_checkpoint(folder / "small" / "checkpoints" / "step_00000002").index
    assert (index.data, index.samples) == (source.data, source.samples)


def test_a_users_mistake_is_one_message(folder, expand):
    (folder / "taken" / "checkpoints" / "step_00000001").mkdir(parents=True)
    damaged = folder / "damaged"
    shutil.copytree(folder / "small", damaged, dirs_exist_ok=True)
    shard = next((damaged / "checkpoints").glob("*/shard_00000.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    cases = {
        "there is no such folder": {"source": "nothing", "target": "new"},
        "holds step_00000001 already. Nothing is overwritten": {"target": "taken"},
        "damaged: its checksum is": {"source": "damaged", "target": "new"},
        "The Pile models 150M, 450M, 900M and 1.5B differ": {"arguments": ("model.hidden_size=64",)},
        "has model.parameter_tokens {qkv: 13, proj: 11, ffn: 37} and model.num_layers 2 already": {
            "arguments": ("model.parameter_tokens.qkv=13", "model.parameter_tokens.ffn=37")
        },
        "growth.method: gram needs at least 13 new qkv tokens": {
            "arguments": ("growth.from=x", "growth.method=gram", "model.parameter_tokens.qkv=20")
        },
        "unknown": {"arguments": ("growth.from=x", "growth.noize=1")},
    }
    for message, case in cases.items():
        done = expand(case.get("target", "new"), *case.get("arguments", ()), source=case.get("source", "small"))
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout
        assert done.stderr.count("error: ") == 1 and message in done.stderr, done.stderr
    assert not (folder / "new").exists()


def test_an_empty_path_is_not_the_current_folder(folder):
    done = tool("expand_checkpoint", "--from", folder / "small", "--config", folder / "config.yml", "--to", "")
    assert done.returncode == 2 and "argument --to: '' is no path" in done.stderr


def test_it_needs_no_deepspeed(folder):
    script = (
        "import runpy, sys; tool, sys.argv = sys.argv[1], sys.argv[1:]; runpy.run_path(tool, run_name='__main__'); "
        "assert 'deepspeed' not in sys.modules"
    )
    done = run([sys.executable, "-c", script, TOOL, "--from", folder / "small", "--config", folder / "config.yml",
                "--to", folder / "nodeepspeed", *BIGGER])  # fmt: skip
    assert done.returncode == 0, done.stdout
