"""A checkpoint that somebody changed, with its checksums: it loads, or one message says which file and field is
wrong."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mutations import Forger

from megatron_tf.checkpoint.compare import compare
from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME, CheckpointIndex, expected_tensors, shard_name
from megatron_tf.checkpoint.manager import find_latest, resolve
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.checkpoint.summary import summarize
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.commands.inspect_checkpoint import print_summary
from megatron_tf.config.load import dump_config
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import ParameterTokens
from megatron_tf.convert.official_checkpoint import exportable_model
from megatron_tf.errors import MESSAGE_LIMIT, CheckpointError, DamagedError, UserError
from megatron_tf.growth.grow import grow
from megatron_tf.growth.source import growth_entry
from megatron_tf.inference.cache import CachedModel
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sampling import generate
from megatron_tf.pruning.measure import pruned_start
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource
from megatron_tf.training.account import account, run_settings
from megatron_tf.training.guard import LossGuard
from megatron_tf.training.start import begin, choose, first_stage_to_run
from megatron_tf.training.warm_start import EVENT

COUNTS = ParameterTokens(qkv=10, proj=9, ffn=12)
DATA = {"seed": 7, "sources": [{"name": "text", "weight": 1.0, "tokens": 4000, "bin_bytes": 8000, "idx_bytes": 500,
                                "ends_sha256": "0" * 64}]}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> RunConfig:
    return RunConfig.model_validate(
        {"run": {"dir": str(tmp_path / "run"), "seed": 7},
         "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 32,
                   "rotary_fraction": 0.5,
                   "parameter_tokens": COUNTS.model_dump()},
         "training": {"train_tokens": 100_000, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp32"},
         "optimizer": {"lr": 1e-3}, "data": {"train": ({"path": "unused"},)}}
    )  # fmt: skip


@pytest.fixture
def checkpoint(run) -> Path:
    """A checkpoint at step 20 with everything that an index can hold, in two shards' worth of pieces."""
    table, initial = parameter_table(run.model), InitialSource(run.model, 0)
    small = run.model.model_copy(update={"parameter_tokens": ParameterTokens(qkv=8, proj=9, ffn=10)})
    entry = growth_entry(method="zero_key", moments="keep", source="runs/small/checkpoints/step_00000010", step=10,
                         samples=80, tokens=1280, old_model=small, new_model=run.model)  # fmt: skip
    layers = {"method": "identity", "from": 1, "to": run.model.num_layers, "old_at": [0]}
    guard = {"lr_factor": 0.5, "mean_loss": 3.0, "lowest_mean_loss": 2.9, "losses_seen": 9, "spikes_in_a_row": 0}
    index = CheckpointIndex(
        20, 160, 3840, run.model.model_dump(mode="json"), initial.scales,
        expected_tensors({name: spec.shape for name, spec in table.items()}),
        {name: ((0, spec.width, 20), (spec.width, spec.numel, 10)) if spec.numel > spec.width else ((0, spec.numel, 20),
                                                                                                    )
         for name, spec in table.items()},
        ({**entry, "noise": 0.0, "preserves": True, "loss_before": 3.5, "loss_after": 3.5, "layers": layers,
          "sparse": {"from": None, "to": None}},), DATA, {"wandb": "1a2b3c"},
        {"guard": guard, "schedule_unit": 128, "cur_scale": 65536.0, "cur_iter": 20, "last_overflow_iter": -1,
         "settings": run_settings(run, 2),
         "history": [{"event": EVENT, "source": "runs/other", "step": 5, "tokens": 640},
                     {"event": "resumed", "step": 10, "tokens": 2560, "changes": {"optimizer.lr": ["0.1", "0.001"]}}]},
    )  # fmt: skip
    pieces = [
        Piece(name, state, 0, spec.numel, initial.read(name, "weight", 0, spec.numel) + 0.1)
        for name, spec in table.items()
        for state in STATES
    ]
    return save_checkpoint(Path(run.run.dir) / "checkpoints", pieces, index, rank=0, world_size=1, token="t")


def use(path: Path, run: RunConfig) -> None:
    """All that this project does with a checkpoint, but training itself."""
    reader = open_checkpoint(resolve(path))
    reader.verify()
    summary = summarize(reader)
    print_summary(reader, summary)
    json.dumps(summary)
    later = run.model_copy(update={"run": run.run.model_copy(update={"dir": f"{run.run.dir}-later"})})
    first_stage_to_run([run, later], 1)
    list(compare(reader, reader))
    start = begin(run, path, DATA)
    plan = plan_batches(run, 1, start.progress.step, start.run_tokens, start.run_state.get("schedule_unit"))
    assert plan.schedule_position(start.progress.step) >= 0 and start.earlier_flops(run.model) >= 0
    assert set(start.old_tokens) <= {"qkv", "proj", "ffn"} and len(start.first_new(run.model)) in (0, 10)
    growth = Growth(source="runs/small", method="gram", noise=0.5)
    told = account(run.model_copy(update={"growth": growth}), start, 1, None)
    dump_config(told.config)
    LossGuard(run.guard, start.run_state.get("guard", {})).watch(1, 3.0)
    resume = CheckpointSource(reader)
    for method in ("gram", "zero_key"):
        larger = run.model.model_copy(update={"parameter_tokens": ParameterTokens(qkv=20, proj=20, ffn=30)})
        grown = grow(reader, larger, Growth(source="x", method=method, noise=0.1), seed=1, data=DATA).source
        for source, model in ((grown, larger), (resume, run.model)):
            for name, spec in parameter_table(model).items():
                source.read(name, "weight", 0, spec.numel)
                source.adam_steps(name, 0, spec.numel)
    exportable_model(reader)
    smaller = run.model.model_copy(update={"parameter_tokens": COUNTS.model_copy(update={"ffn": 9})})
    pruned_start(reader, smaller, {"blocks.0.ffn": torch.arange(9)}, {"blocks.0.ffn": 2.0}, {})
    model = load_model(path)
    for _ in generate(CachedModel(model), [[1, 2]], num_tokens=2, context=model.config.seq_length):
        pass


def outcomes(path: Path, run: RunConfig, seed: int, count: int) -> Iterator[str]:
    """What each of `count` forgeries ends in: "used", or the message."""
    forger = Forger(path, seed)
    for number in range(count):
        name = forger.forge()
        try:
            use(path, run)
            yield "used"
        except UserError as error:
            message = str(error)
            assert len(message) <= MESSAGE_LIMIT and message.replace("\n", "").isprintable(), (seed, number, message)
            yield message
        except BaseException as error:
            raise AssertionError(f"forgery {number} of seed {seed}, in {name}: {error!r}") from error
        finally:
            forger.restore()


def test_a_forgery_is_used_or_refused_in_one_message(checkpoint, run, capsys):
    use(checkpoint, run)
    found = list(outcomes(checkpoint, run, seed=1, count=300))
    assert 10 < found.count("used") < 150, "the forgeries are to hit what matters"


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_NAME, shard_name(0)])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory"])
def test_what_is_no_file_neither_hangs_nor_crashes_a_reader(checkpoint, run, name, kind, monkeypatch):
    place = checkpoint / name
    place.unlink()
    monkeypatch.chdir(checkpoint)  # the path of a socket may be short only
    with socket.socket(socket.AF_UNIX) as bound:
        if kind == "FIFO":
            os.mkfifo(place)
        elif kind == "socket":
            bound.bind(name)
        elif kind == "device":
            place.symlink_to("/dev/zero")
        else:
            place.mkdir()
        with pytest.raises(DamagedError, match=f"{name} cannot be read .*{kind}"):
            open_checkpoint(checkpoint)
        assert [path for path, _ in find_latest(checkpoint.parent, verify=True)[1]] == [checkpoint]
        with pytest.raises(UserError, match=f"none that can be used:(.|\n)*{name} cannot be read .*{kind}"):
            choose(run)


def replaced(field: str, value: str) -> Callable[[Path], str]:
    """Puts raw JSON in the place of a field of the index."""

    def forge(folder: Path) -> str:
        content = json.loads((folder / INDEX_NAME).read_bytes())
        *parents, key = field.split("/")
        holder = content
        for parent in parents:
            holder = holder[int(parent) if isinstance(holder, list) else parent]
        holder[int(key) if isinstance(holder, list) else key] = "@"
        (folder / INDEX_NAME).write_text(json.dumps(content).replace('"@"', value))
        return INDEX_NAME

    return forge


QUERY = "tensors/blocks.0.attention.query.key_tokens"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run/guard/lr_factor", '"fast"', "run.guard.lr_factor is 'fast': must be a number"),
        ("run/guard", "[]", r"run.guard is \[\]: must be a section with keys"),
        ("run/guard/losses_seen", "-3", "run.guard.losses_seen is -3: must be at least 0"),
        ("run/schedule_unit", "0", "run.schedule_unit is 0: must be at least 1"),
        ("run/cur_scale", "1e999", "run.cur_scale is inf"),
        ("run/history/0/tokens", "null", "run.history.0.tokens is None"),
        ("run/history/1/changes", '{"a": [1, 2]}', "run.history.1.changes.a.0 is 1: must be text"),
        ("run/settings", '{"a": 1}', "run.settings.a is 1: must be text"),
        ("data/sources", "7", "data.sources is 7: must be a list"),
        ("data/sources/0/tokens", '"4k"', "data.sources.0.tokens is '4k': must be a whole number"),
        ("growth_history/0/from", "null", "growth_history.0.from is None"),
        ("growth_history/0/from/qkv", "0", "growth_history.0.from.qkv is 0"),
        (
            "growth_history/0/to",
            '{"qkv": 10, "ffn": 12}',
            r"growth_history.0.to has \['qkv', 'ffn'\], the model \['qkv'",
        ),
        ("growth_history/0/tokens", "1" + 30 * "0", "growth_history.0.tokens is 10+"),
        ("growth_history/0/tokens", "3841", "growth_history.0.tokens is 3841, and there were 3840 after that"),
        ("growth_history/0/source", '"a\\u0000b"', r"growth_history.0.source is 'a\\x00b': .* without NUL"),
        ("trackers/wandb", "[]", "trackers.wandb is a list, expected a string"),
        ("tokens", 5000 * "9", "index.json: not valid JSON .a number of thousands of digits"),
        ("step", str(2**63), "step is 9223372036854775808, expected an integer of at most"),
        ("model", 400_000 * "[", "index.json: not valid JSON"),
        ("run/guard", 500 * '{"a": ' + "1" + 500 * "}", r"run.guard.a.a.* is more than 16 levels deep"),
        ("model/hidden_size", '"wide"', "model.hidden_size must be a whole number, here 'wide'"),
        ("scales/blocks.0.ffn", "1" + 400 * "0", "scales.blocks.0.ffn is 10+.*, expected a number above 0"),
        (f"{QUERY}/shape", "[1152921504606846976, 8]", "query.key_tokens.shape holds 1152921504606846976"),
        (f"{QUERY}/shape", "[1152921504606846975, 8]", "query.key_tokens.shape is .* too large for a tensor"),
        (f"{QUERY}/states/weight/pieces/0/2", '"../shard"', "pieces names '../shard', which is not a file name"),
        (f"{QUERY}/states/weight/pieces/0/2", '"index.json"', "index.json: header length .* does not fit"),
    ],
)
def test_a_forged_field_is_named_with_its_file(checkpoint, run, field, value, message):
    forger = Forger(checkpoint, 0)
    forger.fit(replaced(field, value)(checkpoint))
    with pytest.raises(CheckpointError, match=message) as caught:
        use(checkpoint, run)
    assert len(str(caught.value)) <= MESSAGE_LIMIT


def test_a_header_is_read_as_strictly(checkpoint):
    forger, name = Forger(checkpoint, 0), shard_name(0)
    content = (checkpoint / name).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    key = b'"final_norm.bias/weight/0": {'
    for changed, message in {
        b"[" * 400_000: "not valid JSON",
        b'{"a": ' + b"9" * 5000 + b"}": "a number of thousands of digits",
        b"[]": "the file is a list, expected an object",
        header.replace(key, key + b'"dtype": "F32", '): "the field 'dtype' stands there twice",
        header.replace(key, key + b'"more": 1, '): "final_norm.bias/weight/0.more is not a field",
        header.replace(b"[8]", b"[8.0]"): "shape holds 8.0, expected integers",
        header.replace(b"[8]", b"[-8]"): "shape holds -8, expected integers",
        header.replace(
            b'"F32", "shape": [8]', b'"F16", "shape": [8]'
        ): "is of 'F16' with 1 dimensions, expected a flat F32",
        header.replace(b"[8]", b"[8, 1]"): "is of 'F32' with 2 dimensions, expected a flat F32",
    }.items():
        assert changed != header
        (checkpoint / name).write_bytes(len(changed).to_bytes(8, "little") + changed + data)
        forger.fit(name)
        with pytest.raises(DamagedError, match=message) as caught:
            open_checkpoint(checkpoint).verify()
        assert name in str(caught.value) and len(str(caught.value)) <= MESSAGE_LIMIT
