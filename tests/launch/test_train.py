"""launch/train.py as users start it: launchers, what a run writes, resuming, growing."""

from __future__ import annotations

import gzip
import json
import sys

import pytest
import torch
from launching import TRAIN, free_port, run, train

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.load import load_config


def metrics(folder, run_dir="run"):
    return [json.loads(line) for line in (folder / run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(folder, run_dir="run"):
    return {record["step"]: record["train/loss"] for record in metrics(folder, run_dir) if "train/loss" in record}


def succeed(result):
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_a_run_writes_what_it_promises(folder):
    out = succeed(train(folder))
    assert "step 6/6" in out and "validation loss" in out
    assert "Traceback" not in out and "WARNING" not in out
    assert f"data    4,000 tokens in {folder}/tokens, 0.193 passes over them" in out
    records = metrics(folder)
    keys = {"step", "tokens", "train/loss", "optim/lr", "optim/grad_norm", "perf/tokens_per_second", "perf/mfu",
            "perf/step_seconds", "perf/data_wait_share"}  # fmt: skip
    assert [r["step"] for r in records if "train/loss" in r] == [1, 2, 3, 4, 5, 6]
    assert all(keys <= r.keys() for r in records if "train/loss" in r)
    assert [r["step"] for r in records if "eval/loss" in r] == [0, 3, 6]
    assert all("eval/perplexity" in r for r in records if "eval/loss" in r)
    assert records[-1]["tokens"] == 6 * 8 * 16
    assert load_config(folder / "run" / "config.yml") == load_config(folder / "config.yml")
    assert "step 6/6" in (folder / "run" / "train.log").read_text()
    steps = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert steps == ["step_00000003", "step_00000006"]
    index = open_checkpoint(folder / "run" / "checkpoints" / steps[-1]).index
    assert (index.step, index.samples, index.tokens) == (6, 48, 768)


@pytest.mark.slow
def test_the_time_of_a_step_and_a_trace_of_it(folder):
    """On two pipeline stages of one rank each, and tensor parallel: all phases are there."""
    for ranks, layout in ((2, "parallel.pipeline=2"), (2, "parallel.tensor=2")):
        out = succeed(train(folder, layout, f"run.dir={folder}/{layout}",
                            "training.profile={first_step: 3, num_steps: 2}",
                            ranks=ranks))  # fmt: skip
        assert "forward" in out and "backward" in out
        shares = [{key.removeprefix("perf/share_"): value for key, value in record.items() if "perf/share_" in key}
                  for record in metrics(folder, layout) if "train/loss" in record]  # fmt: skip
        for share in shares:
            assert set(share) == {"data", "forward", "backward", "communication", "optimizer", "other"}
            assert sum(share.values()) == pytest.approx(1)
            assert all(share[phase] > 0 for phase in share if phase != "other")
        (path,) = (folder / layout / "profile").iterdir()
        assert path.name == "step3-rank0.json.gz" and str(path) in out
        names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        assert names.count("optimizer") >= 2 and {"forward", "backward", "communication"} <= set(names)


def test_starting_compiles_nothing(folder):
    """DeepSpeed would compile a C++ op at the first start, and a stale lock of it makes every later start hang."""
    extensions = folder / "extensions"
    succeed(train(folder, "training.train_steps=2", TORCH_EXTENSIONS_DIR=str(extensions)))
    assert not extensions.exists() or not any(extensions.iterdir())


def test_a_finished_run_only_says_so(folder):
    succeed(train(folder))
    before = metrics(folder)
    assert "the run is complete" in succeed(train(folder))
    shorter = succeed(train(folder, "training.train_steps=5"))
    assert "WARNING: training.train_steps: 5, and the run was trained for 6 already: nothing is left to do" in shorter
    assert metrics(folder) == before


def test_resume_is_bit_identical_and_leaves_no_gap(folder):
    """Also the mean loss of step 4, to which step 3 belongs, that was made before the checkpoint."""
    every_second = "logging.interval_steps=2"
    succeed(train(folder, f"run.dir={folder}/whole", every_second))
    # the plan stays the same (the learning rate depends on it); the run is cut off by losing its last checkpoint
    succeed(train(folder, every_second))
    newest = folder / "run" / "checkpoints" / "step_00000006"
    (newest / "manifest.json").unlink()
    out = succeed(train(folder, every_second))
    assert "resumed from" in out and "at step 3" in out and "step_00000006: not used" in out
    assert losses(folder) == losses(folder, "whole") and set(losses(folder)) == {2, 4, 6}
    assert all(r["train/loss"] != r["train/loss_step"] for r in metrics(folder) if "train/loss" in r)
    assert [r["step"] for r in metrics(folder)] == [r["step"] for r in metrics(folder, "whole")]
    one, other = load_logical(folder / "run"), load_logical(folder / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_batch_on_resume_keeps_the_tokens_and_the_learning_rate(folder):
    length = ["training.train_steps=null", f"training.train_tokens={6 * 128}", "optimizer.schedule.warmup_steps=4"]
    succeed(train(folder, *length))
    rates = {record["step"]: record["optim/lr"] for record in metrics(folder) if "optim/lr" in record}
    (folder / "run" / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    succeed(train(folder, *length, "training.global_batch_size=4"))
    after = {record["step"]: record["optim/lr"] for record in metrics(folder) if "optim/lr" in record}
    assert metrics(folder)[-1]["tokens"] == 768 and max(after) == 3 + 6
    assert [after[4], after[6], after[8]] == pytest.approx([rates[4], rates[5], rates[6]])
    assert after[5] == pytest.approx((rates[4] + rates[5]) / 2, rel=0.02)


@pytest.mark.parametrize(
    ("launcher", "fresh"),
    [("torchrun", True), ("deepspeed", False), pytest.param("deepspeed", True, marks=pytest.mark.scale)],
)
def test_launchers(folder, launcher, fresh):
    """`fresh`: real ones, which import everything themselves."""
    out = succeed(train(folder, "parallel.tensor=2", "parallel.sequence=true", ranks=2, launcher=launcher, fresh=fresh))
    assert out.count("step 6/6") == 1 and "TP2×PP1×DP1, sequence-parallel" in out
    succeed(train(folder, f"run.dir={folder}/one"))
    assert losses(folder) == pytest.approx(losses(folder, "one"), rel=1e-5)


def test_srun_variables_are_understood(folder):
    slurm = {"SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
             "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    assert "step 6/6" in succeed(train(folder, **slurm))


def test_grow_on_another_layout(folder):
    succeed(train(folder, ranks=2))
    out = succeed(
        train(folder, f"run.dir={folder}/grown", f"growth.from={folder}/run", "model.parameter_tokens.ffn=75",
              "model.parameter_tokens.qkv=29", "parallel.pipeline=2", ranks=2)
    )  # fmt: skip
    assert "grown from" in out and "held batch" in out
    end, start = metrics(folder)[-1], metrics(folder, "grown")[0]
    assert start["eval/loss"] == pytest.approx(end["eval/loss"], rel=1e-6)
    assert start["tokens"] == end["tokens"] == 768  # the count goes on
    index = open_checkpoint(folder / "grown" / "checkpoints" / "step_00000006").index
    assert index.samples == 96  # the data goes on too: no sample is seen twice
    entry = index.growth_history[0]
    assert entry["from"]["ffn"] == 37 and entry["to"]["ffn"] == 75
    assert entry["loss_before"] == pytest.approx(entry["loss_after"], rel=1e-6)
    assert index.scales["blocks.0.ffn"] == 37**0.5 and index.scales["blocks.0.attention.proj"] == 11**0.5


@pytest.mark.slow
def test_frozen_old_tokens_stay_to_the_last_bit(folder):
    """Under weight decay, clipping and ZeRO on two ranks, and over a resume; all else learns."""
    succeed(train(folder))
    old = load_logical(folder / "run")
    grow = [f"run.dir={folder}/grown", f"growth.from={folder}/run", "model.parameter_tokens.ffn=75",
            "growth.lr_multipliers={old_tokens: 0, new_tokens: 2, new_tokens_decay_steps: 4}",
            "optimizer.weight_decay=0.5"]  # fmt: skip
    succeed(train(folder, *grow, ranks=2))
    whole = load_logical(folder / "grown")
    (folder / "grown" / "checkpoints" / "step_00000006" / "manifest.json").unlink()
    succeed(train(folder, *grow))
    new = load_logical(folder / "grown")
    # the rate of new tokens goes on where it was: an update of Adam is about as large as the rate, 1e-2
    assert all(torch.allclose(new[name], tensor, rtol=0, atol=1e-4) for name, tensor in whole.items())
    for name, tensor in old.items():
        kept = torch.equal(new[name][: len(tensor)], tensor)
        assert kept == name.endswith("tokens"), name
    keys = new["blocks.0.ffn.key_tokens"][37:]
    assert (keys.norm(dim=1) > 0).all()  # new keys were 0


@pytest.mark.slow
def test_the_rates_of_a_grown_model_follow_its_tokens(folder):
    """Fresh moments make the first update of each element its rate: that of the new count, times that of the growth."""
    succeed(train(folder, "training.train_steps=2", "evaluation.interval_steps=null"))
    grow = [f"run.dir={folder}/grown", f"growth.from={folder}/run", "model.parameter_tokens.ffn=148",
            "growth.moments=reset", "growth.lr_multipliers.old_tokens=0.5", "optimizer.weight_decay=0",
            "optimizer.lr_rule={base_tokens: {qkv: 13, proj: 11, ffn: 37}}", "training.train_steps=1",
            "optimizer.schedule={type: constant, warmup_steps: 0}", "checkpoint.interval_steps=1"]  # fmt: skip
    out = succeed(train(folder, *grow, ranks=2))
    assert "rates   × optimizer.lr: qkv 1 keys, 1 values; proj 1 keys, 1 values; ffn 0.5 keys, 0.25 values" in out
    old, new = load_logical(folder / "run"), load_logical(folder / "grown")
    change = {name: (new[name][: len(tensor)] - tensor).abs().median().item() for name, tensor in old.items()}
    assert change["blocks.0.ffn.key_tokens"] == pytest.approx(1e-2 * 0.5 * 0.5, rel=1e-2)
    assert change["blocks.1.ffn.value_tokens"] == pytest.approx(1e-2 * 0.25 * 0.5, rel=1e-2)
    assert change["blocks.1.attention.query.key_tokens"] == pytest.approx(1e-2 * 0.5, rel=1e-2)
    # they were 0
    new_keys = new["blocks.0.ffn.key_tokens"][37:]
    assert new_keys.abs().median().item() == pytest.approx(1e-2 * 0.5, rel=1e-2)


@pytest.mark.slow
def test_a_transformer_grows_in_width(folder):
    """On two tensor ranks: the proof, another growth of the one before, and a resume."""
    plain = ["model.architecture=transformer", "model.parameter_tokens=null", "training.train_steps=2"]
    succeed(train(folder, *plain, "model.ffn_hidden_size=37"))
    wide = [*plain, "model.hidden_size=64", "model.num_attention_heads=8", "model.num_key_value_heads=8",
            "parallel.tensor=2"]  # fmt: skip
    once = [*wide, f"run.dir={folder}/grown", f"growth.from={folder}/run", "model.ffn_hidden_size=74"]
    out = succeed(train(folder, *once, ranks=2))
    assert "width 32 -> 64 by cloning" in out and "held batch" in out
    entry = open_checkpoint(folder / "grown" / "checkpoints" / "step_00000002").index.growth_history[0]
    assert entry["preserves"] and entry["loss_before"] == pytest.approx(entry["loss_after"], rel=1e-6)
    again = [*wide, f"run.dir={folder}/again", f"growth.from={folder}/grown", "model.ffn_hidden_size=148"]
    succeed(train(folder, *again, ranks=2))
    out = succeed(train(folder, *again, "training.train_steps=3", ranks=2))
    assert (
        "resumed from" in out
        and len(open_checkpoint(folder / "again" / "checkpoints" / "step_00000003").index.growth_history) == 2
    )


def test_help_needs_no_set_up():
    assert "section.field=value" in succeed(run([sys.executable, TRAIN, "--help"]))
