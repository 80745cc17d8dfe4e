"""Batches come earlier, and are the same: their order, their errors, and no thread stays."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from live import PATIENCE_SECONDS, until

from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.loader import BatchLoader, build_dataset
from megatron_tf.data.prefetch import STEPS_AHEAD, Prefetcher
from megatron_tf.errors import DataError

CPU, STEP = torch.device("cpu"), 12  # samples of a step: 2 ranks × 3 micro batches × 2


@pytest.fixture
def loader(tmp_path):
    with IndexedWriter(tmp_path / "a", 60_000) as writer:
        writer.add_document(range(2_000))
    dataset = build_dataset([DataSource(path=str(tmp_path / "a"))], 8, 1, 60_000)
    return BatchLoader(dataset, micro_batch_size=2, num_micro_batches=3, data_rank=1, data_size=2, vocab_size=60_000)


@pytest.fixture
def prefetcher(loader):
    made = Prefetcher(loader, STEP, CPU)
    yield made
    made.close()


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def listed(batches) -> list[list]:
    return [[ids.tolist(), labels.tolist()] for ids, labels in batches]


# a run, one that resumes in the middle, and one that a caller moves about
@pytest.mark.parametrize(
    "firsts", [range(0, 30 * STEP, STEP), range(60, 20 * STEP, STEP), (0, 12, 240, 252, 12, 24, 24)]
)
def test_the_batches_are_the_loaders(loader, prefetcher, firsts):
    for first in firsts:
        assert listed(prefetcher.step_batches(first)) == listed(loader.step_batches(first))


class Scripted:
    """In the loader's place: notes what it is asked for, can hold on and can fail."""

    def __init__(self, bad: int | None = None):
        self.begun, self.asked, self.bad, self.may_go_on = [], [], bad, threading.Event()
        self.may_go_on.set()

    def step_batches(self, first):
        self.begun.append(first)
        self.may_go_on.wait(PATIENCE_SECONDS)
        self.asked.append(first)
        if first == self.bad:
            raise DataError(f"token id at sample {first}")
        yield torch.tensor([[first]]), torch.tensor([[first]])


def test_it_is_ahead_by_so_many_steps_and_no_more():
    loader = Scripted()
    prefetcher = Prefetcher(loader, STEP, CPU)
    prefetcher.step_batches(0)
    until(lambda: len(loader.asked) == 1 + STEPS_AHEAD, "the steps ahead were read")
    time.sleep(0.05)
    assert loader.asked == [0, 12, 24]
    prefetcher.close()


def test_an_error_belongs_to_its_step():
    """The thread meets it two steps before; those steps are trained, and the error is the loader's own."""
    loader = Scripted(bad=36)
    prefetcher = Prefetcher(loader, STEP, CPU)
    for first in (0, 12, 24):
        assert listed(prefetcher.step_batches(first)) == [[[[first]], [[first]]]]
    until(lambda: 36 in loader.asked, "the bad step was read")
    with pytest.raises(DataError, match="^token id at sample 36$"):
        prefetcher.step_batches(36)
    prefetcher.close()
    assert threads() == []


def test_the_caller_waits_for_a_loader_that_is_late():
    loader = Scripted()
    loader.may_go_on.clear()
    prefetcher = Prefetcher(loader, STEP, CPU)
    began = time.monotonic()
    threading.Timer(0.2, loader.may_go_on.set).start()
    assert listed(prefetcher.step_batches(0)) == [[[[0]], [[0]]]]
    assert time.monotonic() - began > 0.15
    prefetcher.close()


def test_no_thread_is_left():
    loader = Scripted()
    prefetcher = Prefetcher(loader, STEP, CPU)
    assert threads() == []  # none before there is work
    prefetcher.step_batches(0)
    assert len(threads()) == 1
    prefetcher.close()
    prefetcher.close()
    assert threads() == []


def test_going_elsewhere_and_closing_drop_what_was_not_begun():
    loader = Scripted()
    prefetcher = Prefetcher(loader, STEP, CPU)
    prefetcher.step_batches(0)
    until(lambda: len(loader.asked) == 3, "the steps ahead were read")
    loader.may_go_on.clear()
    prefetcher.step_batches(12)
    until(lambda: 36 in loader.begun, "the thread was held at 36")
    prefetcher.step_batches(24)  # and 48 waits behind it
    prepare = prefetcher._prepare

    def asked_for(first):
        # 48 is dropped by then
        prepare(first)
        loader.may_go_on.set()

    prefetcher._prepare = asked_for
    assert listed(prefetcher.step_batches(240)) == [[[[240]], [[240]]]]
    prefetcher.close()
    assert loader.asked[:5] == [0, 12, 24, 36, 240]
    asked = len(loader.asked)
    time.sleep(0.05)
    assert len(loader.asked) == asked


def test_a_gpu_gets_pinned_memory(loader, monkeypatch):
    """Without a GPU: what is asked of torch, and of which thread."""
    said = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: said.append((device, threading.current_thread().name)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: said.append("pinned") or tensor)
    monkeypatch.setattr(Prefetcher, "_on_device", lambda self, tensor: tensor)
    prefetcher = Prefetcher(loader, STEP, torch.device("cuda", 3))
    assert listed(prefetcher.step_batches(0)) == listed(loader.step_batches(0))
    prefetcher.close()
    assert said[0] == (torch.device("cuda", 3), "prefetch_0") and said.count("pinned") >= 6
