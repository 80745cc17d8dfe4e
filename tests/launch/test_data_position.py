"""The data position is a number of samples: no change of the layout between two starts repeats or skips one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from launching import train

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.load import load_config
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.loader import BatchLoader, build_dataset
from megatron_tf.engine.base import StepResult
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.training.guard import LossGuard
from megatron_tf.training.loop import Trainer
from megatron_tf.training.profiler import StepProfiler
from megatron_tf.training.start import Progress

# (data-parallel ranks, micro batch): what follows is the accumulation, since a step is always 8 samples
LAYOUTS = ((1, 2), (2, 2), (2, 1), (4, 1), (1, 8), (1, 1), (4, 2), (2, 4))
STEPS = 4  # of each layout


@pytest.fixture
def countable(tmp_path, folder):
    """The configuration of `folder` with data in which no token comes twice, so that a sample's first token is its
    id."""
    with IndexedWriter(tmp_path / "countable", vocab_size=60_000) as writer:
        writer.add_document(range(2_000))
    return folder / "config.yml", (f"data.train=[{{path: {tmp_path}/countable}}]", "model.vocab_size=60000")


class Recorder:
    """In the engine's place: notes the samples of a step and learns nothing."""

    def __init__(self):
        self.samples, self.clock = [], StepClock()

    def train_step(self, step, batches, lr_factor) -> StepResult:
        micro_batches = [inputs[:, 0].tolist() for inputs, _ in batches]
        self.samples.append(micro_batches)
        return StepResult(torch.tensor(0.0), None, 0.0, skipped=False)


def consume(countable, progress: Progress, ranks: int, micro_batch: int) -> tuple[list[int], Progress]:
    """The ids of the samples of STEPS steps from `progress`, as the trainer takes them, in their order; where it
    ends."""
    path, overrides = countable
    config = load_config(path, [*overrides, f"training.micro_batch_size={micro_batch}"])
    plan = plan_batches(config, ranks)
    dataset = build_dataset(config.data.train, config.model.seq_length, config.run.seed, config.model.vocab_size)
    by_rank, ends = [], set()
    for rank in range(ranks):
        trainer = object.__new__(Trainer)  # only its bookkeeping of steps and samples is wanted here
        trainer.config, trainer.plan, trainer.engine, trainer.progress = config, plan, Recorder(), progress
        trainer.guard = LossGuard(config.guard, {})
        trainer.profiler = StepProfiler(None, rank, Path("unused"), trainer.engine.clock, console=None)
        trainer.training = BatchLoader(
            dataset, micro_batch_size=plan.micro_batch_size, num_micro_batches=plan.num_micro_batches,
            data_rank=rank, data_size=plan.data_parallel, vocab_size=config.model.vocab_size,
        )  # fmt: skip
        for _ in range(STEPS):
            trainer._train_step()
        by_rank.append(trainer.engine.samples)
        ends.add(trainer.progress)
    (end,) = ends
    return [
        sample
        for step in range(STEPS)
        for number in range(plan.num_micro_batches)
        for rank in range(ranks)
        for sample in by_rank[rank][step][number]
    ], end


def straight(countable, num_samples: int) -> list[int]:
    config = load_config(countable[0], countable[1])
    dataset = build_dataset(config.data.train, config.model.seq_length, config.run.seed, config.model.vocab_size)
    return [int(dataset.sample(number)[0]) for number in range(num_samples)]


@pytest.mark.parametrize(("before", "after"), [*pairwise(LAYOUTS), (LAYOUTS[-1], LAYOUTS[0])])
def test_another_layout_goes_on_with_the_next_sample(countable, before, after):
    first, position = consume(countable, Progress(), *before)
    assert (position.step, position.samples) == (STEPS, 8 * STEPS)
    second, position = consume(countable, position, *after)
    assert first + second == straight(countable, 16 * STEPS)
    assert len({*first, *second}) == 16 * STEPS, "the samples of the test's data must be told apart"
    assert (position.step, position.samples) == (2 * STEPS, 16 * STEPS)


def test_many_changes_over_more_than_an_epoch(countable):
    """124 samples an epoch; all layouts one after the other take 256."""
    seen, position = [], Progress()
    for layout in LAYOUTS:
        samples, position = consume(countable, position, *layout)
        seen += samples
    assert seen == straight(countable, 8 * STEPS * len(LAYOUTS))
    epoch = 1_999 // 16
    assert sorted(seen[:epoch]) == sorted(seen[epoch : 2 * epoch]) and len(set(seen[:epoch])) == epoch


@pytest.mark.slow
def test_a_run_that_resumes_on_twice_the_ranks(folder):
    def losses(run):
        records = map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())
        return [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]

    results = [train(folder, f"run.dir={folder}/whole"), train(folder)]
    newest = folder / "run" / "checkpoints" / "step_00000006"
    (newest / "manifest.json").unlink()  # the learning rate follows the plan, so the plan stays and the end is lost
    results.append(train(folder, "training.micro_batch_size=1", ranks=2))
    assert [result.returncode for result in results] == [0, 0, 0], results[-1].stdout
    assert (
        "at step 3" in results[-1].stdout and "1 a micro batch × 4 accumulated × 2 data-parallel" in results[-1].stdout
    )
    resumed, whole = losses("run"), losses("whole")
    assert [step for step, _ in resumed] == [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], rel=1e-5)
    assert open_checkpoint(newest).index.samples == 48
