from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bases import decoder, questions, tokenformer, write_base, write_lines
from launching import PROJECT, environment, free_port, warm
from live import PATIENCE_SECONDS
from peft import PeftModel, get_peft_model
from tooling import tool

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.folder import read_adapter, write_adapter
from megatron_tf.adapters.growth import grow_adapter
from megatron_tf.adapters.tuner import adapter_of
from megatron_tf.errors import ConfigError, UserError
from megatron_tf.finetuning import run as module
from megatron_tf.finetuning.saving import Progress, read_progress, save
from megatron_tf.finetuning.section import load_finetune
from megatron_tf.inference.load import load_model
from megatron_tf.runtime.environment import detect
from megatron_tf.runtime.run_folder import run_folder_lock
from megatron_tf.shipped import find_finetuning

CONFIG = """
run: {{dir: {folder}/run}}
base: {{path: {folder}/base, precision: fp32}}
adapter: {{tokens: 4}}
data: {{train: {folder}/train.jsonl, validation: {folder}/train.jsonl, seq_length: 32}}
training: {{train_steps: 6, global_batch_size: 4, micro_batch_size: 2}}
optimizer: {{lr: 1e-2, weight_decay: 0.0, schedule: {{warmup_steps: 1}}}}
checkpoint: {{interval_steps: 2}}
evaluation: {{interval_steps: 3}}
logging: {{interval_steps: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_base(folder / "base")
    write_lines(folder / "train.jsonl", questions())
    (folder / "config.yml").write_text(CONFIG.format(folder=folder))
    return folder


def command(folder: Path, *overrides: str, ranks: int = 0) -> list[str]:
    head = [sys.executable]
    if ranks:
        head = ["torchrun", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return warm([*head, PROJECT / "launch" / "finetune.py", folder / "config.yml", *overrides])


def finetune(folder: Path, *overrides: str, ranks: int = 0) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *overrides, ranks=ranks),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


# Is given a script with its arguments, and sends itself a signal when step 3 is logged: a reader of its output may be
# late, and six steps take no time.
SIGNALLED = """
import os, runpy, signal, sys
from megatron_tf.telemetry.trackers import Trackers

log = Trackers.log

def log_and_signal(self, metrics, step):
    log(self, metrics, step)
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)

Trackers.log = log_and_signal
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def evaluated(run: Path) -> float:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-1]["eval/loss"]


@pytest.mark.slow
def test_a_run_trains_resumes_and_shares_its_batch_out(folder):
    done = finetune(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(folder / "run")
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and found[6] < found[1] - 0.2
    assert [path.name for path in sorted((folder / "run" / "checkpoints").iterdir())] == [
        "step_00000004",
        "step_00000006",
    ]
    adapter = read_adapter(folder / "run" / "adapter")
    config = PattentionConfig.from_pretrained(folder / "run" / "adapter")
    PeftModel.from_pretrained(decoder(), folder / "run" / "adapter")
    assert adapter.config["num_tokens"] == config.num_tokens == 4

    # half, stopped by a signal, and gone on with, is the same to the last bit
    half = f"run.dir={folder}/half"
    (folder / "signalled.py").write_text(SIGNALLED)
    python, *words = command(folder, half)
    stopped = subprocess.run(
        [python, folder / "signalled.py", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert 3 <= max(losses(folder / "half")) < 6 and not (folder / "half" / "adapter").exists()
    done = finetune(folder, half)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "half") == found
    again = read_adapter(folder / "half" / "adapter")
    assert all(torch.equal(branch.values, again.branches[name].values) for name, branch in adapter.branches.items())

    done = finetune(folder, f"run.dir={folder}/two", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder / "two") == pytest.approx(found, abs=1e-5)

    # a checkpoint of one process goes on over two ranks with a part of everything each, and the last of theirs on one
    shutil.copytree(
        folder / "run" / "checkpoints" / "step_00000004", folder / "parts" / "checkpoints" / "step_00000004"
    )
    parts = (f"run.dir={folder}/parts", "parallel.shard=parameters", "training.activation_checkpointing=true")
    done = finetune(folder, *parts, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(folder / "parts") == pytest.approx({step: found[step] for step in (5, 6)}, abs=1e-5)
    assert evaluated(folder / "parts") == pytest.approx(evaluated(folder / "run"), abs=1e-5)
    of_one, of_two = (read_progress(folder / name / "checkpoints" / "step_00000006") for name in ("run", "parts"))
    assert of_two.progress == of_one.progress and of_one.progress.tokens > 0
    for state, moments in of_one.moments.items():
        for name, tensor in moments.items():
            torch.testing.assert_close(of_two.moments[state][name], tensor, rtol=1e-3, atol=1e-6)
    sharded = read_adapter(folder / "parts" / "adapter")
    for name, branch in adapter.branches.items():
        torch.testing.assert_close(sharded.branches[name].keys, branch.keys, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_grown_adapter_goes_on_without_packing_and_recomputed(folder, tmp_path):
    done = finetune(folder, f"run.dir={tmp_path}/first", "training.train_steps=2")
    assert done.returncode == 0, done.stderr
    grown = grow_adapter(read_adapter(tmp_path / "first" / "adapter"), 8, freeze_old=True)
    write_adapter(tmp_path / "grown", grown)
    options = ("adapter.tokens=null", f"adapter.from={tmp_path}/grown", f"run.dir={tmp_path}/second",
               "data.packing=false",
               "training.activation_checkpointing=true", "base.precision=bf16",
               "logging.trackers=[tensorboard]")  # fmt: skip
    done = finetune(folder, *options)
    assert done.returncode == 0, done.stderr
    assert f"tensorboard --logdir {tmp_path}/second/tensorboard" in done.stdout
    assert list((tmp_path / "second" / "tensorboard").glob("events*"))
    trained = read_adapter(tmp_path / "second" / "adapter")
    assert (trained.config["num_tokens"], trained.config["frozen_tokens"]) == (8, 4)
    for name, branch in trained.branches.items():
        assert torch.equal(branch.keys[:4], grown.branches[name].keys[:4])
        assert not torch.equal(branch.keys[4:], grown.branches[name].keys[4:])
    # what a resume would not do as it was asked is refused
    write_lines(tmp_path / "other.jsonl", questions(5))
    done = finetune(folder, *options, f"data.train={tmp_path}/other.jsonl")
    assert done.returncode == 2 and "data.train: the files are not those that" in done.stderr, done.stderr
    # and a run that was trained for longer says so, as every run does
    done = finetune(folder, *options, "training.train_steps=2")
    assert done.returncode == 0, done.stderr
    assert "WARNING: training.train_steps: 2, and the run was trained for 6 already: nothing is left" in done.stdout
    again = read_adapter(tmp_path / "second" / "adapter")
    assert all(torch.equal(branch.keys, again.branches[name].keys) for name, branch in trained.branches.items())


@pytest.mark.slow
def test_a_tokenformer_is_fine_tuned_by_more_tokens_and_they_are_merged(folder, tmp_path):
    write_base(tmp_path / "base", model=tokenformer())
    run = (f"base.path={tmp_path}/base", f"run.dir={tmp_path}/run", "training.train_steps=4")
    done = finetune(folder, *run)
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "run")
    assert found[4] < found[1] - 0.05
    adapter = read_adapter(tmp_path / "run" / "adapter").config
    assert (adapter["modules"], adapter["scale"], len(adapter["target_modules"])) == (["pattention"], None, 10)
    done = tool("merge_adapter", "--base", tmp_path / "base", "--adapter", tmp_path / "run",
                "--to", tmp_path / "merged")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "on base and adapter: logits differ by" in done.stdout and "on text: logits differ by" in done.stdout
    done = tool("convert_checkpoint", "from-hf", tmp_path / "merged", "--to", tmp_path / "on")
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ids = torch.arange(20).view(2, 10)
        torch.testing.assert_close(load_model(tmp_path / "on")(ids), load_model(tmp_path / "merged")(ids))


@pytest.mark.slow
def test_bad_input_is_one_message_and_nothing_is_written(folder, tmp_path):
    run = f"run.dir={tmp_path}/run"
    for override, message in (
        ("data.seq_length=100", "data.seq_length: 100, and the base's context is 64 tokens"),
        ("base.path=/nowhere", "/nowhere: there is no such folder"),
    ):
        done = finetune(folder, run, override)
        assert (done.returncode, done.stderr.count("error: ")) == (2, 1) and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_an_adapter_of_other_modules_is_not_gone_on_with(tmp_path):
    adapter = adapter_of(get_peft_model(decoder(), PattentionConfig(num_tokens=4, modules=["attention", "mlp"])))
    newest = save(tmp_path / "run" / "checkpoints", Progress(3, "digest"), adapter, {})
    write_lines(tmp_path / "train.jsonl", questions())
    (tmp_path / "base").mkdir()
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=tmp_path))
    config = load_finetune(tmp_path / "config.yml", ["adapter.modules=[mlp]"])
    with pytest.raises(ConfigError, match="adapter.modules: mlp, and .*step_00000003 has attention, mlp. Restore them"):
        module._model(config, newest, "digest")


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """Begins a run whose base is loaded by a given function."""
    write_lines(tmp_path / "train.jsonl", questions())
    (tmp_path / "base").mkdir()
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=tmp_path))
    monkeypatch.setattr(module, "load_tokenizer", lambda path: None)
    monkeypatch.setattr(module, "_read", lambda config, tokenizer: ([], []))
    monkeypatch.setattr(module, "_place", lambda config, model, device: None)

    def begin(load):
        monkeypatch.setattr(module, "_model", load)
        module.finetune(load_finetune(tmp_path / "config.yml", []), detect({}), None)

    return begin


def test_the_folder_is_locked_before_its_newest_checkpoint_is_looked_for(begun, tmp_path):
    """A run that ends just now may still save, while the next one loads the base."""
    (tmp_path / "run").mkdir()

    def load(config, newest, data):
        with run_folder_lock(tmp_path / "run", 0.0):
            raise AssertionError("another run could still save")

    with pytest.raises(UserError, match="run.dir: .*/run is in use by process"):
        begun(load)


def test_a_run_that_has_begun_and_ended_meanwhile_is_not_begun_again(begun, tmp_path):
    def load(config, newest, data):
        assert newest is None
        (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / "step_00000002" / "training.json").write_text("{}")
        return None, None

    with pytest.raises(UserError, match="another run has begun in .*/run while this one started, and has saved"):
        begun(load)
    assert not (tmp_path / "run" / "config.yml").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.token=4", "adapter.token: unknown key. Did you mean adapter.tokens?"),
        ("training.train_steps=0", "training.train_steps: 0 is out of range. It must be at least 1."),
        ("base.precision=fp8", "base.precision: the text 'fp8', but one of bf16, fp32 is expected."),
        ("optimizer.schedule.warmup_steps=7", "warmup_steps: 7 is more than the run's 6 steps. Set it to at most 6"),
        ("optimizer.schedule.type=wsd", "optimizer.schedule.decay_steps: wsd needs the number of its last, decaying"),
        ("optimizer.schedule={type: wsd, decay_steps: 9}", "decay_steps: 9 and optimizer.schedule.warmup_steps 0 are"),
        ("optimizer.schedule.decay_steps=3", "decay_steps: 3 is for schedule type wsd only"),
        ("optimizer.schedule.min_lr=9", "optimizer.schedule.min_lr: 9 is above optimizer.lr"),
        (
            "optimizer.lr_rule={base_tokens: {qkv: 1, proj: 1, ffn: 1}}",
            "optimizer.lr_rule: is for models of parameter tokens",
        ),
        ("optimizer.layer_decay=0.5", "optimizer.layer_decay: is for layers of a model"),
        ("optimizer.candidate_lr_factor=0.5", "optimizer.candidate_lr_factor: is for candidates of a model"),
        ("adapter.from=x", "adapter.from: has tokens and modules of its own"),
        ("base=null", "base: nothing (null), but a section with keys is expected."),
        ("model.hidden_size=3", "model: unknown key"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_key(folder, override, message):
    with pytest.raises(ConfigError) as refused:
        load_finetune(folder / "config.yml", [override])
    assert message in str(refused.value)


def test_a_configuration_shows_what_differs_from_the_one_it_extends(folder, tmp_path):
    own = tmp_path / "own.yml"
    own.write_text(f"extends: {folder}/config.yml\nrun: {{dir: {tmp_path}/run}}\ntraining: {{train_steps: 9}}\n")
    config = load_finetune(own)
    base = load_finetune(folder / "config.yml")
    assert (config.run.dir, config.training.train_steps, base.training.train_steps) == (f"{tmp_path}/run", 9, 6)
    assert (config.training.global_batch_size, config.data) == (base.training.global_batch_size, base.data)
    own.write_text("extends: smollm2\nrun: {dir: elsewhere}\n")
    assert load_finetune(own).base.path == "models/smollm2"
    for text, message in (
        ("extends: smollm2\ntraining: {train_steps: 9}\n", "run.dir: missing"),
        ("extends: own.yml\nrun: {dir: x}\n", "is a circle of files"),
        ("extends: nowhere.yml\nrun: {dir: x}\n", "nowhere.yml: No such file"),
    ):
        own.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_finetune(own)


def test_the_shipped_configuration_is_whole():
    assert find_finetuning("smollm2") == PROJECT / "configs" / "finetune" / "smollm2.yml"
    assert find_finetuning("./smollm2") == Path("smollm2") and find_finetuning("other") == Path("other")
    config = load_finetune(find_finetuning("smollm2"))
    assert config.adapter.tokens == 64 and config.optimizer.schedule.warmup_steps == 10
