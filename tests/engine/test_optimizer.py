from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from megatron_tf.config.sections.model import Model
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.convert.official import load_official_state_dict
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.model import build_model
from megatron_tf.state.parameters import parameter_table

GOLDEN = Path(__file__).parents[1] / "golden"


def segment(name, start, stop, buffer, offset, decayed=True, age=0.0):
    return Segment(name, start, stop, buffer, offset, True, decayed, torch.tensor(age))


def optimizer(buffer, weight_decay=0.1):
    return SegmentedOptimizer([buffer], Optimizer(lr=1e-2, weight_decay=weight_decay))


@pytest.mark.parametrize("run", ["const", "sched"])
def test_ten_steps_agree_with_the_official_training(run):
    golden = load_file(GOLDEN / "adam_steps.safetensors")
    embedding = golden["init/sequential.0.word_embeddings.weight"]
    layers = sum(name.startswith("init/") for name in golden) // 10
    prefix = "init/sequential.2."
    sizes = {"num_layers": layers, "hidden_size": embedding.shape[1], "num_attention_heads": 4, "seq_length": 32}
    tokens = {
        "qkv": golden[f"{prefix}attention.query.key_param_tokens"].shape[0],
        "proj": golden[f"{prefix}attention.proj.key_param_tokens"].shape[0],
        "ffn": golden[f"{prefix}mlp.key_param_tokens"].shape[0],
    }
    config = Model.model_validate({**sizes, "vocab_size": embedding.shape[0], "parameter_tokens": tokens})
    model = build_model(config)
    load_official_state_dict({k[5:]: v for k, v in golden.items() if k.startswith("init/")}, model)
    table = parameter_table(config)
    adam = SegmentedOptimizer(model.parameters(), Optimizer(lr=1e-3))
    adam.bind(segment(name, 0, p.numel(), p, 0, decayed=table[name].decayed) for name, p in model.named_parameters())
    schedule = Optimizer(lr=1e-3, schedule={"type": "cosine", "warmup_steps": 3, "min_lr": 1e-4})
    for step, batch in enumerate(golden["batches"]):
        adam.param_groups[0]["lr"] = lr = 1e-3 if run == "const" else learning_rate(step, schedule, 10)
        assert lr == pytest.approx(golden[f"{run}/lr"][step].item(), rel=1e-6)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        assert loss.item() == pytest.approx(golden[f"{run}/loss"][step].item(), abs=1e-5)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.item() == pytest.approx(golden[f"{run}/grad_norm"][step].item(), rel=1e-4)
        adam.step()
    squares, count = 0.0, 0
    for name, parameter in model.named_parameters():
        error = parameter.detach() - golden[f"final_{run}/{table[name].official_name}"]
        squares, count = squares + error.square().sum().item(), count + error.numel()
    assert (squares / count) ** 0.5 <= 1e-6  # every wrong choice tried gave at least 4.8e-6


def test_nothing_happens_before_bind():
    buffer = torch.ones(4, requires_grad=True)
    adam = optimizer(buffer)
    buffer.grad = torch.ones(4)
    adam.step()
    assert (buffer == 1).all()


def test_segments_of_one_buffer_equal_separate_parameters():
    flat = torch.randn(10).requires_grad_()
    first, second = flat.detach()[:6].clone().requires_grad_(), flat.detach()[6:].clone().requires_grad_()
    adam = optimizer(flat)
    adam.bind([segment("a", 0, 6, flat, 0), segment("b", 20, 24, flat, 6, decayed=False)])
    reference = torch.optim.AdamW(
        [{"params": [first], "weight_decay": 0.1}, {"params": [second], "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for _ in range(3):
        flat.grad = torch.randn(10)
        first.grad, second.grad = flat.grad[:6].clone(), flat.grad[6:].clone()
        adam.step()
        reference.step()
    torch.testing.assert_close(flat.detach(), torch.cat([first, second]).detach())


def test_a_young_segment_has_its_own_bias_correction():
    """A segment of age 0 next to an old one moves like a fresh Adam, by about lr, whatever β₂."""
    flat = torch.zeros(4).requires_grad_()
    adam = SegmentedOptimizer([flat], Optimizer(lr=1e-2, betas=(0.9, 0.999), eps=1e-12, weight_decay=0.0))
    adam.bind([segment("old", 0, 2, flat, 0, age=10_000.0), segment("new", 2, 4, flat, 2)])
    flat.grad = torch.full((4,), 0.5)
    adam.step()
    assert flat[2:].tolist() == pytest.approx([-1e-2, -1e-2], rel=1e-4)
    assert abs(flat[0].item()) > 2.5e-2  # what the inherited age would have done to the new ones


def test_padding_of_the_flat_buffer_is_left_alone():
    flat = torch.ones(8).requires_grad_()
    adam = optimizer(flat)
    adam.bind([segment("a", 0, 6, flat, 0)])
    flat.grad = torch.ones(8)
    adam.step()
    assert (flat[6:] == 1).all() and (flat[:6] < 1).all()


def test_the_hook_comes_before_anything_changes():
    flat = torch.ones(4).requires_grad_()
    adam = optimizer(flat)
    adam.bind([segment("a", 0, 4, flat, 0)])
    flat.grad = torch.ones(4)
    seen = []
    adam.before_update = lambda: seen.append((flat.detach().clone(), adam.num_updates))
    adam.step()
    ((weights, updates),) = seen
    assert (weights == 1).all() and updates == 0 and (flat != 1).all()


def test_a_multiplier_is_another_learning_rate():
    """Each part as torch's AdamW at its own rate; at 0 nothing changes, not by weight decay either."""
    torch.manual_seed(0)
    buffer = torch.randn(12, requires_grad=True)
    parts = {0.0: slice(0, 4), 0.5: slice(4, 7), 1.0: slice(7, 12)}
    start = buffer.detach().clone()
    ours = optimizer(buffer)
    ours.bind(
        Segment(f"{rate}", 0, part.stop - part.start, buffer, part.start, True, True, torch.tensor(0.0), rate)
        for rate, part in parts.items()
    )
    theirs = {rate: start[part].clone().requires_grad_() for rate, part in parts.items() if rate}
    adams = [
        torch.optim.AdamW([tensor], lr=1e-2 * rate, betas=(0.9, 0.95), weight_decay=0.1)
        for rate, tensor in theirs.items()
    ]
    for _ in range(3):
        buffer.grad = torch.randn(12)
        for (rate, tensor), adam in zip(theirs.items(), adams):
            tensor.grad = buffer.grad[parts[rate]].clone()
            adam.step()
        ours.step()
    assert torch.equal(buffer[parts[0.0]], start[parts[0.0]])
    for rate, tensor in theirs.items():
        torch.testing.assert_close(buffer[parts[rate]], tensor, rtol=1e-6, atol=1e-7)


def test_a_skipped_step_changes_nothing_and_the_next_one_counts():
    buffer = torch.randn(4, requires_grad=True)
    start = buffer.detach().clone()
    adam = optimizer(buffer)
    adam.bind([segment("a", 0, 4, buffer, 0)])
    buffer.grad = torch.ones(4)
    adam.skip_next = True
    adam.step()
    assert torch.equal(buffer, start) and adam.num_updates == 0
    adam.step()
    assert not torch.equal(buffer, start) and adam.num_updates == 1
