from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_tf.checkpoint import compare as module
from megatron_tf.checkpoint.compare import compare
from megatron_tf.checkpoint.reader import open_checkpoint


@pytest.fixture
def save(sandbox):
    def save_state(state, shapes=None, step=10):
        index = sandbox.index(step) if shapes is None else sandbox.index(step, shapes)
        (path,) = sandbox.save(sandbox.split(state, 1, seed=step), index)
        return open_checkpoint(path)

    return save_state


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 8)


def test_equal_whatever_the_layout(sandbox, save):
    state = sandbox.state()
    differences = list(compare(save(state), save(state, step=11)))
    assert len(differences) == 9
    assert all(difference.equal for difference in differences)


def test_one_element_differs(sandbox, save):
    state = {key: torch.ones_like(values) for key, values in sandbox.state().items()}
    other = {key: values.clone() for key, values in state.items()}
    other["embedding.weight", "exp_avg"][20] = 1.5
    (found,) = [d for d in compare(save(state), save(other, step=11)) if not d.equal]
    assert (found.name, found.state, found.unequal, found.compared, found.largest) == (
        "embedding.weight",
        "exp_avg",
        1,
        35,
        0.5,
    )


def test_a_nan_against_a_number_is_a_difference(sandbox, save):
    state = {key: torch.ones_like(values) for key, values in sandbox.state().items()}
    other = {key: values.clone() for key, values in state.items()}
    other["embedding.weight", "weight"][3] = math.nan
    (found,) = [d for d in compare(save(state), save(other, step=11)) if not d.equal]
    assert math.isnan(found.largest)


def test_grown_missing_and_reshaped_tensors(sandbox, save):
    shapes = {"a": (2, 3), "b": (4,), "c": (2, 2)}
    bigger = {"a": (5, 3), "c": (1, 4), "d": (1,)}
    state = {key: torch.zeros_like(values) for key, values in sandbox.state(0, shapes).items()}
    other = {key: torch.zeros_like(values) for key, values in sandbox.state(0, bigger).items()}
    found = {d.name: d for d in compare(save(state, shapes), save(other, bigger, step=11)) if d.state == "weight"}
    assert not any(difference.equal for difference in found.values())
    assert (found["a"].shapes, found["a"].compared, found["a"].unequal) == (((2, 3), (5, 3)), 6, 0)
    assert (found["b"].shapes, found["d"].shapes) == (((4,), None), (None, (1,)))
    assert found["c"].compared == 0
    assert replace(found["a"], shapes=((2, 3), (2, 3))).equal
