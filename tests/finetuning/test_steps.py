from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from bases import decoder
from peft import get_peft_model

from megatron_tf.adapters import PattentionConfig
from megatron_tf.finetuning.examples import Example
from megatron_tf.finetuning.steps import Computing, backward


@pytest.fixture(autouse=True)
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_do_not_depend_on_the_micro_batch():
    """Those of the balance of candidates neither, which are not of the loss over learnt tokens."""
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=64, candidates=4, group_size=8, modules="mlp"))
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "value_tokens" in name:
                parameter.normal_(std=0.05)
    ids = torch.randint(3, 90, (8, 13), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [[Example(row, [False] + 12 * [True], "")] for row in ids]
    found = {}
    for micro_batch in (8, 2, 1):
        model.zero_grad()
        computing = Computing(torch.device("cpu"), 0, 1, False, None, micro_batch, False)
        loss, _ = backward(model, rows, list(parameters.values()), computing)
        found[micro_batch] = {"loss": torch.tensor(loss), **{name: p.grad.clone() for name, p in parameters.items()}}
    assert any("balance" in name and gradient.any() for name, gradient in found[8].items())
    for micro_batch in (2, 1):
        for name, gradient in found[8].items():
            torch.testing.assert_close(found[micro_batch][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
