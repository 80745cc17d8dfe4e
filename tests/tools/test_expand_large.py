"""Growing checkpoints of gigabytes: how much memory and time it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import PROJECT, environment
from peak_memory import counted_from_zero

TOOL = PROJECT / "tools" / "expand_checkpoint.py"
MEMORY_LIMIT_BYTES = 2 * 2**30  # of a growth of any size; measured is under 0.2 GB
SHARE_OF_COPY = 0.5
ROUNDS = 3
LARGE_CONFIG = """
run: {{dir: {folder}/large}}
model:
  num_layers: {num_layers}
  hidden_size: 768
  num_attention_heads: 12
  seq_length: 16
  vocab_size: {vocab_size}
  parameter_tokens: {{qkv: 4850, proj: 4850, ffn: 19400}}
training: {{train_steps: 2, global_batch_size: 1, micro_batch_size: 1}}
optimizer: {{lr: 1e-2}}
data: {{train: [{{path: {folder}/tokens}}]}}
"""
# Writes the initial model of argv[1] as a checkpoint under argv[2].
INITIAL = """
import sys
from megatron_tf.state.optimizer_states import STATES, WEIGHT
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.shards import ComputedTensor
from megatron_tf.state.sources import InitialSource
from megatron_tf.checkpoint.writer import ComputedPiece, save_checkpoint
from megatron_tf.config.load import load_config
from megatron_tf.state.parameters import parameter_table
model = load_config(sys.argv[1]).model
table, initial = parameter_table(model), InitialSource(model, 1)
index = CheckpointIndex(
    100, 100, 1600, model.model_dump(mode="json"), initial.scales,
    expected_tensors({name: spec.shape for name, spec in table.items()}),
    {name: ((0, spec.numel, 100),) for name, spec in table.items()},
)
def computed(name, numel):
    return ComputedTensor(numel, lambda start, target: initial.read_into(name, "weight", start, target))
pieces = [ComputedPiece(name, state, 0, spec.numel, computed(name, spec.numel))
          for name, spec in table.items() for state in STATES]
save_checkpoint(sys.argv[2], pieces, index, rank=0, world_size=1, token="t")
"""
# Runs the tool of argv[1:] and prints what its work has added to the libraries' memory, and its seconds.
MEASURE = """
import json, resource, runpy, sys, time
import torch, megatron_tf.checkpoint.step_zero, megatron_tf.data.loader, megatron_tf.config.load
import megatron_tf.telemetry.console
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began = peak(), time.perf_counter()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(json.dumps({"bytes": peak() - before, "seconds": time.perf_counter() - began}))
"""
MORE_TOKENS = (
    "model.parameter_tokens.qkv=8620", "model.parameter_tokens.proj=8620", "model.parameter_tokens.ffn=34480",
)  # fmt: skip
# Candidates, and tokens that stay one.
LARGER = {"zero_key": MORE_TOKENS, "gram": MORE_TOKENS,
          "split": ("model.sparse={ffn: {group_size: 80, candidates: 4, dense: 9400}}",)}  # fmt: skip


@contextmanager
def initial(root: Path, **sizes: int) -> Iterator[Path]:
    """A folder with a checkpoint of layers of the 757M model, and their configuration."""
    folder = root / "large"
    folder.mkdir()
    if shutil.disk_usage(folder).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    (folder / "config.yml").write_text(LARGE_CONFIG.format(folder=folder, **sizes))
    checkpoints = folder / "large" / "checkpoints"
    subprocess.run([sys.executable, "-c", INITIAL, folder / "config.yml", checkpoints], check=True, env=environment())
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 1.8 GB; one of the 1.4B model's takes 3 GB."""
    with initial(tmp_path_factory.mktemp("large"), num_layers=2, vocab_size=50304) as folder:
        yield folder


def measured(folder: Path, target: Path, method: str) -> dict[str, float]:
    shutil.rmtree(target, ignore_errors=True)
    overrides = *LARGER[method], "growth.from=x", f"growth.method={method}"
    done = subprocess.run(
        counted_from_zero([sys.executable, "-c", MEASURE, TOOL, "--from", folder / "large", "--config",
                           folder / "config.yml", "--to", target, *overrides]),
        check=True, env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zero_key", "split"])
def test_memory_is_bounded(tmp_path, method):
    with initial(tmp_path, num_layers=1, vocab_size=99) as folder:
        figures = measured(folder, folder / "grown", method)
        assert next((folder / "grown").glob("*/*/shard*")).stat().st_size > 1.2e9
    assert figures["bytes"] < 0.25 * MEMORY_LIMIT_BYTES, figures


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.parametrize("method", ["zero_key", "gram"])
def test_memory_is_bounded_whatever_the_size(large, method):
    figures = measured(large, large / "grown", method)
    assert next((large / "grown").glob("*/*/shard*")).stat().st_size > 2.9e9
    assert figures["bytes"] < 0.25 * MEMORY_LIMIT_BYTES, figures


@pytest.mark.timing
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["zero_key", "gram"])
def test_half_the_speed_of_copying(large, method):
    """`-s` shows the figures. In turns; the best counts, since other programs use the disk as well."""
    growing, copying = [], []
    for _ in range(ROUNDS):
        growing.append(measured(large, large / "grown", method)["seconds"])
        shard, copy = next((large / "grown").glob("*/*/shard*")), large / "copy"
        script = (
            "import sys, time, subprocess; t = time.perf_counter(); subprocess.run(sys.argv[1:], check=True); "
            "print(time.perf_counter() - t)"
        )
        timed = [sys.executable, "-c", script, "dd", f"if={shard}", f"of={copy}", "bs=16M", "conv=fsync", "status=none"]
        copying.append(float(subprocess.run(timed, check=True, stdout=subprocess.PIPE, text=True).stdout))
        copy.unlink()
    print(f"\n{method}: {[round(s, 1) for s in growing]} s, copying {[round(s, 1) for s in copying]} s")
    assert min(copying) / min(growing) >= SHARE_OF_COPY
