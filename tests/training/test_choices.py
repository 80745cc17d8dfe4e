"""The proof of a growth follows the choices of the smaller model, and counts those that rounding decides."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import spawn
from tiny import run_config

from megatron_tf.errors import CheckpointError
from megatron_tf.model import build_model
from megatron_tf.model.routing import choose
from megatron_tf.model.sparse_pattention import SparsePattention
from megatron_tf.training.choices import Followed, following, recorded
from megatron_tf.training.growth_proof import Probe, compare

IDS = torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(0))


def model(candidates: int, ffn: int = 64):
    bank = {"group_size": 16, "candidates": candidates}
    tokens = {"qkv": 13, "proj": 11, "ffn": ffn}
    torch.manual_seed(0)
    return build_model(run_config(model={"parameter_tokens": tokens, "sparse": {"ffn": bank}}).model)


def split(small: torch.nn.Module, large: torch.nn.Module, shift: float = 0.0) -> None:
    """`large` with what `small` has, each candidate copied to neighbours; later slots stay as they are.

    `shift`: added to the routers of copies, the same for all candidates of a slot.
    """
    with torch.no_grad():
        for name, parameter in large.named_parameters():
            old = small.get_parameter(name)
            if ".bank." not in name:
                parameter[: len(old)] = old
                continue
            rows = 16 if name.endswith("_tokens") else 1
            copies = old.unflatten(0, (-1, 1, rows)).expand(-1, 2, *[-1] * old.dim()).clone()
            if name.endswith("router"):
                copies += shift * torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1))
            parameter[: 2 * len(old)] = copies.flatten(0, 2)


@torch.no_grad()
@pytest.mark.parametrize("ffn", [64, 96])
def test_a_grown_model_follows(ffn):
    """Also where it has slots that the smaller one had not, whose keys are 0."""
    small, large = model(3), model(6, ffn)
    split(small, large, shift=1.0)
    for block in large.blocks:
        block.ffn.bank.key_tokens[4 * 6 * 16 :] = 0
        block.ffn.scale = small.blocks[0].ffn.scale
    with recorded(small) as choices:
        before = [small(IDS), small(IDS.flip(1))]
    assert {name: (own.candidates, len(own.forwards)) for name, own in choices.items()} == {
        "blocks.0.ffn": (3, 2), "blocks.1.ffn": (3, 2)}  # fmt: skip
    with following(large, choices) as followed:
        after = [large(IDS), large(IDS.flip(1))]
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert followed == Followed(total=2 * 2 * 32 * 4, elsewhere=0)
    assert all(block.ffn.choose is choose for of in (small, large) for block in of.blocks)


@torch.no_grad()
def test_what_goes_elsewhere_is_counted_and_comes_back():
    small, large = model(3), model(6)
    split(small, large)
    large.blocks[1].ffn.bank.balance[:2] += 100
    with recorded(small) as choices:
        before = small(IDS)
    with following(large, choices) as followed:
        after = large(IDS)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    first = choices["blocks.1.ffn"].forwards[0][:, 0]
    assert followed.elsewhere == int((first != 0).sum()) > 0


def ranks_follow(group):
    """Each rank has recorded whole slots of its own, and follows those that it holds now."""
    logits = [torch.randn(5, slots, 3, generator=torch.Generator().manual_seed(slots)) for slots in (2, 4)]
    layers = []
    for slots in (2, 4):
        layer = torch.nn.Module()
        layer.ffn = SparsePattention(16 * slots, 8, 8, group_size=16, candidates=3, group=group)
        layers.append(layer)
    own = [slice(group.rank * slots // 2, (group.rank + 1) * slots // 2) for slots in (2, 4)]
    with recorded(layers[0]) as choices:
        layers[0].ffn.choose(logits[0][:, own[0]], torch.zeros(1, 3))
    assert torch.equal(choices["ffn"].forwards[0], logits[0].argmax(-1))
    with following(layers[1], choices) as followed:
        found = layers[1].ffn.choose(logits[1][:, own[1]], torch.zeros(2, 3))
    # the first rank holds both slots that there were, the second one the new ones
    expected = (logits[0] if group.rank == 0 else logits[1][:, 2:]).argmax(-1)
    assert torch.equal(found, expected) and followed.total == (10 if group.rank == 0 else 0)
    everywhere = torch.tensor(followed.elsewhere)
    dist.all_reduce(everywhere)
    assert everywhere == (logits[0].argmax(-1) != logits[1][:, :2].argmax(-1)).sum()


def test_over_a_tensor_group():
    spawn(ranks_follow, 2)


def proof(group):
    same, device = Probe(3.0, torch.ones(2, 2)), torch.device("cpu")
    text = compare(same, same, Followed(1000, 1), "fp32", device, preserves=True)
    assert "1 of 1,000 choices among candidates are so close that rounding decides them" in text
    assert "choices" not in compare(same, same, Followed(1000, 0), "fp32", device, preserves=True)
    with pytest.raises(CheckpointError, match="the growth changed the function.*2 of 1,000 choices"):
        compare(same, same, Followed(1000, 2), "fp32", device, preserves=True)


def test_other_choices_are_a_changed_function():
    spawn(proof, 1)
