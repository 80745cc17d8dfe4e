from __future__ import annotations

import pytest
import torch

from megatron_tf.growth import routers
from megatron_tf.growth.routers import fit_routers
from megatron_tf.model.routing import BALANCE_SPEED, choose, relative_load
from megatron_tf.state.parameters import INITIAL_STD

SLOTS, CANDIDATES, SIZE, WIDTH = 3, 4, 16, 24


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(x: torch.Tensor, keys: torch.Tensor, seed: int = 5) -> torch.Tensor:
    fitted, balances = fit_routers(x, keys, CANDIDATES, seed)
    logits = (x @ fitted.flatten(0, 1).mT).unflatten(1, (len(keys), CANDIDATES))
    return choose(logits, balances)


def load(choice: torch.Tensor) -> torch.Tensor:
    """[slots, candidates], over an equal share."""
    counts = torch.stack([torch.bincount(slot, minlength=CANDIDATES) for slot in choice.T])
    return relative_load(counts.flatten().cumsum(0).view(len(counts), -1))


def test_each_candidate_gets_a_cluster_of_its_slots_scores():
    """Four clusters far apart in the scores of each slot, and noise that no key sees."""
    keys = random(SLOTS, SIZE, WIDTH, seed=1)
    keys[..., 12:] = 0
    of = torch.arange(400) % CANDIDATES
    x = torch.cat([10 * random(CANDIDATES, 12, seed=2)[of], 100 * random(400, 12, seed=3)], 1) + 3
    choice = chosen(x, keys)
    assert choice.shape == (400, SLOTS)
    for slot in choice.T:
        for cluster in range(CANDIDATES):
            assert len(slot[of == cluster].unique()) == 1, "a cluster is one candidate's"


def test_the_load_is_spread_where_inputs_share_a_direction():
    """Random routers choose by the direction that all inputs share, and leave most candidates without positions."""
    x = random(2000, WIDTH) * torch.linspace(0.1, 2, WIDTH) + 4 * random(WIDTH, seed=4)
    keys = random(SLOTS, SIZE, WIDTH, seed=1)
    fitted = load(chosen(x, keys))
    logits = (x @ random(SLOTS * CANDIDATES, WIDTH, seed=6).mT).unflatten(1, (SLOTS, CANDIDATES))
    unfitted = load(choose(logits, torch.zeros(SLOTS, CANDIDATES)))
    assert fitted.max() < 1.5 and fitted.min() > 0.5
    assert unfitted.max() > 2.5


def test_routers_are_as_large_as_random_ones():
    fitted, balances = fit_routers(random(500, WIDTH), random(SLOTS, SIZE, WIDTH, seed=1), CANDIDATES, 0)
    assert fitted.shape == (SLOTS, CANDIDATES, WIDTH) and balances.shape == (SLOTS, CANDIDATES)
    sizes = fitted.square().mean((1, 2)).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, INITIAL_STD))
    assert balances.abs().max() * BALANCE_SPEED < 100 * INITIAL_STD


def test_slots_one_after_another_have_the_same_routers(monkeypatch):
    x, keys = random(300, WIDTH), random(SLOTS, SIZE, WIDTH, seed=1)
    together = fit_routers(x, keys, CANDIDATES, 0)
    monkeypatch.setattr(routers, "AT_ONCE", 300 * SIZE)
    for one, other in zip(together, fit_routers(x, keys, CANDIDATES, 0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_same_for_the_same_seed_and_in_fp32():
    x, keys = random(300, WIDTH), random(SLOTS, SIZE, WIDTH, seed=1)
    first, again, other = (fit_routers(x, keys, CANDIDATES, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert fit_routers(x.float(), keys.float(), CANDIDATES, 0)[0].dtype == torch.float64


@pytest.mark.parametrize("rows", [1, CANDIDATES - 1])
def test_fewer_positions_than_candidates(rows):
    fitted, balances = fit_routers(random(rows, WIDTH), random(SLOTS, SIZE, WIDTH, seed=1), CANDIDATES, 0)
    assert fitted.isfinite().all() and balances.isfinite().all()


def test_a_slot_whose_keys_are_zero_is_clustered_too():
    keys = random(SLOTS, SIZE, WIDTH, seed=1)
    keys[1] = 0
    assert load(chosen(random(1000, WIDTH), keys))[1].min() > 0.5
