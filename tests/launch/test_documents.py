"""Runs on data in which documents count: boundaries, labels without a loss, and several validation sources."""

from __future__ import annotations

import json
import math

import pytest
from launching import train

from megatron_tf.data.indexed import IndexedWriter

EOD = 98
ASKED = ("data.eod_id=98", "data.reset_at_eod=true", "data.mask_eod_loss=true")


@pytest.fixture
def documents(folder):
    """The folder, with three sets of short documents that end with EOD, and overrides that train and validate on
    them."""
    for name, factor in (("mixed", 7), ("prose", 3), ("code", 11)):
        with IndexedWriter(folder / name, vocab_size=99) as writer:
            for document in range(200):
                writer.add_document([*((document * factor + p * p) % 97 for p in range(5 + document % 11)), EOD])
    sources = f"data.validation=[{{path: {folder}/prose, weight: 3}}, {{path: {folder}/code}}]"
    return folder, (f"data.train=[{{path: {folder}/mixed}}]", sources, "evaluation.samples=16", *ASKED)


def records(folder, run_dir):
    return [json.loads(line) for line in (folder / run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_layout_logs_the_same_losses(documents):
    folder, overrides = documents
    layouts = {
        "one": ((), 0),
        "stages": (("parallel.pipeline=2",), 4),  # and two data-parallel ranks
        "tensor": (("parallel={tensor: 2, sequence: true}",), 2),
    }
    for name, (parallel, ranks) in layouts.items():
        result = train(folder, *overrides, *parallel, f"run.dir={folder}/{name}", ranks=ranks)
        assert result.returncode == 0, result.stdout
    one, *others = (records(folder, name) for name in layouts)
    keys = {"train/loss", "optim/grad_norm", "eval/loss", "eval/loss/prose", "eval/loss/code", "eval/perplexity"}
    assert keys <= {key for record in one for key in record}
    for other in others:
        for mine, its in zip(one, other, strict=True):
            for key in keys & mine.keys():
                assert its[key] == pytest.approx(mine[key], rel=1e-5), key
    shares = [record["perf/data_wait_share"] for run in (one, *others) for record in run if "train/loss" in record]
    assert len(shares) == 18 and all(0 <= share <= 1 for share in shares)
    last = one[-1]
    assert last["eval/loss/prose"] != last["eval/loss/code"]
    assert min(last["eval/loss/prose"], last["eval/loss/code"]) < last["eval/loss"]
    assert max(last["eval/loss/prose"], last["eval/loss/code"]) > last["eval/loss"]
    assert last["eval/perplexity"] == pytest.approx(math.exp(last["eval/loss"]))


def test_a_source_without_a_sample_is_named(documents):
    folder, overrides = documents
    rare = f"data.validation=[{{path: {folder}/prose, weight: 1e6}}, {{path: {folder}/code}}]"
    result = train(folder, *overrides, rare, "training.train_steps=2")
    assert result.returncode == 0, result.stdout
    assert "none of the evaluated samples is of code, so it has no eval/loss/code. Raise evaluation.samples (16)" in (
        " ".join(result.stdout.split())
    )
    assert "eval/loss/code" not in records(folder, "run")[-1]


def test_an_unknown_end_is_refused_before_anything_is_written(documents):
    folder, overrides = documents
    for wrong, said in (("data.eod_id=null", "Give it as data.eod_id"), ("data.eod_id=5",
                                                                         "(16 documents looked at)"),
                        ("data.eod_id=99", "data.eod_id: 99 is beyond the vocabulary")):  # fmt: skip
        result = train(folder, *overrides, wrong)
        assert result.returncode == 2 and said in " ".join(result.stdout.split()), result.stdout
        assert result.stdout.count("error:") == 1 and not (folder / "run").exists()


def test_a_token_beyond_the_vocabulary_ends_the_run_at_its_step(folder):
    """The thread that prepares batches meets it steps before, but the step before it is trained and logged."""
    with IndexedWriter(folder / "bad", vocab_size=60_000) as writer:
        writer.add_document([5] * 1_000 + [30_000] + [5] * 999)
    result = train(folder, f"data.train=[{{path: {folder}/bad}}]", "training.train_steps=100", "data.validation=[]",
                   "evaluation.interval_steps=null")  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stdout, result.stdout
    assert "bad.bin: document 0, token 1000 of it" in " ".join(result.stdout.split())
    steps = [record["step"] for record in records(folder, "run")]
    assert steps == list(range(1, len(steps) + 1)) and bad_step(folder) == len(steps)


def bad_step(folder) -> int:
    """Number of steps before the one that takes the sample with the bad token."""
    from megatron_tf.config.sections.data import DataSource
    from megatron_tf.data.loader import build_dataset

    dataset = build_dataset([DataSource(path=f"{folder}/bad")], 16, 1234, 60_000)
    return next(i for i in range(10_000) if 30_000 in dataset.sample(i)) // 8
