"""The GPU's check on a CPU: its comparisons see what is wrong, and a part that fails stops no other."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_tf.benchmark import fp8, gpu_check
from megatron_tf.benchmark.report import table

CPU = torch.device("cpu")


def test_results_are_right_here(monkeypatch):
    monkeypatch.setattr(gpu_check, "BOUNDS", {torch.float32: gpu_check.BOUNDS[torch.float32]})
    rows = [
        gpu_check._compared("pattention", n, torch.float32, *gpu_check._pattention_pair(CPU, torch.float32, n))
        for n in (13, 40)
    ]
    rows.append(gpu_check._compared("loss", 257, torch.float32, *gpu_check._loss_pair(CPU, torch.float32, 257)))
    rows.append(gpu_check._compared("model", 0, torch.float32, *gpu_check._model_pair(CPU, torch.float32)))
    assert all(row["right"] for row in rows), table(rows)


def test_products_in_fp8_are_right_here_and_timed():
    (row,) = fp8.rows(CPU, [40], 64, 32, 1)
    assert row["right"] and row["fp8 ms"] > 0 and row["bf16 ms"] > 0


def test_a_gpu_without_fp8_is_not_asked_for_it(monkeypatch):
    device = torch.device("cuda", 0)
    for capability, there in (((8, 0), False), ((8, 9), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, own=capability: own)
        assert ("fp8" in gpu_check.parts(device)) is there


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_gradient_is_seen(wrong):
    exact = [torch.ones(3, dtype=torch.float64)] * 2
    row = gpu_check._compared("x", 0, torch.float32, [exact[0], exact[1] * wrong], exact)
    assert row["right"] is False


def test_collectives_of_one_rank():
    (row,) = gpu_check.nccl(CPU)
    assert row["right"]
    assert not torch.distributed.is_initialized()


def test_a_failed_part_is_reported_and_the_next_runs(monkeypatch):
    def fails():
        yield {"right": True}
        raise RuntimeError("no kernel image\nfurther lines")

    parts = {"first": fails, "second": lambda: [{"right": False}, {"right": True}], "third": lambda: [{"a": 1}]}
    monkeypatch.setattr(gpu_check, "parts", lambda device: parts)
    first, second, third = gpu_check.run(CPU, 60)
    assert (first.problem, len(first.rows)) == ("RuntimeError: no kernel image", 1)
    assert second.problem == "1 of 2 results are wrong"
    assert third.problem is None
    assert [part["name"] for part in json.loads(json.dumps(gpu_check.as_json(CPU, [first, second])))["parts"]] == [
        "first",
        "second",
    ]


def test_no_part_begins_when_time_is_up(monkeypatch):
    monkeypatch.setattr(gpu_check, "parts", lambda device: {"late": lambda: [{"a": 1}]})
    (part,) = gpu_check.run(CPU, -1)
    assert part.rows == [] and part.problem == "not run: -1 s were over"
