"""The GPU's check on a CPU: its comparisons see what is wrong, and a part that fails stops no other."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_tf.benchmark import fp8, gpu_check
from megatron_tf.benchmark.report import table
from megatron_tf.model import rounding

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


TIMED = (
    "round S", "round dA", "round dA in PyTorch", "product bf16", "product fp8", "product with rounding", "layer bf16",
    "layer fp8",
)  # fmt: skip


def test_products_in_fp8_are_right_here_and_timed():
    first, second = fp8.rows(CPU, [40, 48], 64, 32, 1)
    for row in (first, second):
        assert row["right"] and row["same bits"] and all(row[f"{name} ms"] > 0 for name in TIMED)
    assert len({len(line) for line in table([first, second]).splitlines()}) == 1


@pytest.mark.parametrize("wrong", ["down", "by_row", "by_column"])
def test_rounding_with_another_bit_is_seen(monkeypatch, wrong):
    right = rounding.rounded

    def rounded(*given, **options):
        made = right(*given, **options)
        changed = getattr(made, wrong)
        if changed is None:
            return made
        bits = changed.clone().view(torch.uint8 if wrong != "down" else torch.int32)
        bits.view(-1)[-1] ^= 1
        return made._replace(**{wrong: bits.view(changed.dtype)})

    monkeypatch.setattr(rounding, "rounded", rounded)
    (row,) = fp8.rows(CPU, [48], 64, 32, 1)
    assert not row["same bits"] and not row["right"]


def test_a_wrong_layer_is_seen(monkeypatch):
    monkeypatch.setattr(fp8, "LAYER_BOUND", 0.01)
    (row,) = fp8.rows(CPU, [48], 64, 32, 1)
    assert row["layer error"] > 0.03 and not row["right"]


def test_kernels_for_rounding_are_checked_here_in_the_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(rounding, "usable", lambda x: True)
    (row,) = fp8.rows(CPU, [48], 32, 32, 1)
    assert row["same bits"] and row["right"]


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
