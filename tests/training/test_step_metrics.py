from __future__ import annotations

import math

import pytest
import torch
from distributed import spawn
from images import image_config

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.summary import CorpusSummary, bytes_per_token, write_summary
from megatron_tf.engine.base import StepResult
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.telemetry import memory
from megatron_tf.telemetry.meters import Rates
from megatron_tf.training import step_metrics
from megatron_tf.training.step_metrics import StepMetrics


def with_summary(prefix, text_bytes):
    with IndexedWriter(prefix, vocab_size=99) as writer:
        writer.add_document([1] * 50)
    write_summary(prefix, CorpusSummary(1, 50, text_bytes, 1, "", 99, 0, (), 0, 0))
    return {"path": str(prefix)}


def test_bits_per_byte(config, tmp_path):
    """Two sources of 4 and 2 bytes a token, of which the second gives three quarters of the samples."""
    first, second = with_summary(tmp_path / "a", 200), with_summary(tmp_path / "b", 100)
    own = config(data={"train": (first, {**second, "weight": 3.0}), "validation": (first,)})
    assert bytes_per_token(own.data.train) == pytest.approx(0.25 * 4 + 0.75 * 2)
    metrics = StepMetrics(own, plan_batches(own, 2), torch.device("cpu"), None).validation(math.log(16), {})
    assert metrics == {"eval/loss": math.log(16), "eval/perplexity": pytest.approx(16), "eval/bits_per_byte": 1.0}


def test_data_without_a_summary_have_no_bytes(config, tmp_path):
    own = config(data={"train": (with_summary(tmp_path / "a", 200), {"path": str(tmp_path / "nowhere")})})
    assert bytes_per_token(own.data.train) is None
    metrics = StepMetrics(own, plan_batches(own, 2), torch.device("cpu"), None)
    assert metrics.validation(2.0, {}).keys() == {"eval/loss", "eval/perplexity"}


def test_memory_is_the_largest_of_the_ranks_and_images_are_counted(config):
    spawn(_ranks, 2, config())


def _ranks(group, config):
    step_metrics.memory_metric = lambda device: ("memory/cpu_resident_bytes", 2**40 + group.rank)
    metrics = StepMetrics(config, plan_batches(config, 2), torch.device("cpu"), None)
    result = StepResult(torch.tensor(3.0), None, 0.5, False, loss_scale=1024.0)
    found = metrics.training(result, 2.5, 4, Rates(2.0, 800.0, 0.125), {"forward": 0.25}, 10)
    assert found["memory/cpu_resident_bytes"] == 2**40 + 1
    assert (found["perf/tokens_per_second_per_device"], found["perf/eta_seconds"]) == (400.0, 20.0)
    assert found["perf/samples_per_second"] == 800 / config.model.seq_length
    assert "perf/images_per_second" not in found
    of_images = image_config()
    images = StepMetrics(of_images, plan_batches(of_images, 2), torch.device("cpu"), None)
    found_there = images.training(result, 2.5, 4, Rates(2.0, 800.0, 0.125), {}, 10)
    assert found_there["perf/images_per_second"] == 800 / of_images.model.seq_length
    assert (found["optim/skipped_steps"], found["optim/grad_norm"], found["optim/loss_scale"]) == (4, None, 1024.0)
    assert (found["train/loss"], found["train/loss_step"]) == (2.5, 3.0)
    assert (found["perf/share_forward"], found["perf/data_wait_share"]) == (0.25, 0.125)


def test_resident_memory_follows_what_is_held():
    start_ranks(_hold, 1)  # a process that has not kept anything that was freed


def _hold(rank):
    before = memory.memory_metric(torch.device("cpu"))[1]
    held = torch.ones(2**25)  # 128 MiB
    after = memory.memory_metric(torch.device("cpu"))[1]
    assert after - before > 100 * 2**20 and held.sum() > 0
