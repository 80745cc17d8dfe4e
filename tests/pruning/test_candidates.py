"""Fewer candidates: what they contribute, and the model that is left, which undoes a split to the last bit."""

from __future__ import annotations

import pytest
import torch
from tiny import run_config
from torch import Tensor

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import CheckpointError, UserError
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import build_model
from megatron_tf.model.routing import choose
from megatron_tf.pruning import candidates as module
from megatron_tf.pruning.candidates import DROP, MERGE, Use, measure_use, mixtures, with_candidates
from megatron_tf.pruning.condensed import CondensedSource, condensed_model
from megatron_tf.pruning.measure import target_counts
from megatron_tf.state.parameters import candidate_counts, parameter_table
from megatron_tf.state.sources import InitialSource, StateSource

STATES = ("weight", "exp_avg", "exp_avg_sq")
TOKENS = {"qkv": 13, "proj": 11, "ffn": 69}
SLOTS, WIDTH, SIZE = 4, 32, 16
IDS = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(0))
NAME = "blocks.1.ffn"


def model(candidates: int, **changes) -> Model:
    bank = {"group_size": SIZE, "candidates": candidates, "dense": 5}
    sparse = {"ffn": bank} if candidates > 1 else None
    return run_config(model={"parameter_tokens": TOKENS, "sparse": sparse, **changes}).model


class Trained(InitialSource):
    """An initial state with moments, and ages by candidate."""

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        if state == "weight":
            return super().read(name, state, start, stop)
        return torch.arange(start, stop, dtype=torch.float32) * (1 + STATES.index(state))

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        return [(start, stop, 4)]


def grown(old: Model, new: Model, source: StateSource | None = None) -> GrownSource:
    return GrownSource(
        source or Trained(old, 7), InitialSource(new, 5), old_model=old, new_model=new,
        growth=Growth(source="x", method="split"), seed=3,
    )  # fmt: skip


def used(source, of: Model) -> dict[str, Use]:
    return measure_use(condensed_model(source, of), [(IDS, IDS)])


def whole(source, name: str, state: str, numel: int, size: int = 10**9) -> Tensor:
    return torch.cat([source.read(name, state, low, min(low + size, numel)) for low in range(0, numel, size)])


@pytest.mark.parametrize("sizes", [(1, 3), (3, 6), (2, 6)])
def test_taking_candidates_away_undoes_a_split_to_the_last_bit(sizes):
    """Merging does for every split. Dropping does when one candidate is left of those that were copied from one."""
    small, large = map(model, sizes)
    before = Trained(small, 7)
    split = grown(small, large, before)
    ways = mixtures(used(split, large), small)
    assert with_candidates(large, {"ffn": sizes[0]}) == small and candidate_counts(small).get("ffn", 1) == sizes[0]
    for way in (DROP, MERGE) if sizes[0] == 1 else (MERGE,):
        back = CondensedSource(split, old_model=large, model=small, mixtures=ways[way])
        assert back.scales == before.scales
        for name, spec in parameter_table(small).items():
            for state in STATES:
                if state == "weight" and name.endswith("router"):
                    continue
                expected = before.read(name, state, 0, spec.numel)
                assert torch.equal(whole(back, name, state, spec.numel), expected), (way, name, state)
                assert torch.equal(whole(back, name, state, spec.numel, 177), expected)
            assert back.adam_steps(name, 0, spec.numel) == [(0, spec.numel, 4)]
        one, other = (condensed_model(source, small) for source in (before, back))
        torch.testing.assert_close(other(IDS), one(IDS), rtol=1e-4, atol=1e-5)


def test_the_contributions_are_those_of_the_definition():
    of = model(3)
    small, x = build_model(of, dtype=torch.float64), torch.randn(40, WIDTH, dtype=torch.float64)
    ffn = small.blocks[1].ffn
    use = Use(*torch.zeros(2, SLOTS, 3, dtype=torch.float64))
    with torch.no_grad():
        module.add_use(ffn, use, x.view(4, 10, WIDTH))
        keys, values = (tokens.view(SLOTS, 3, SIZE, WIDTH) for tokens in (ffn.bank.key_tokens, ffn.bank.value_tokens))
        chosen = choose(ffn.bank.logits(x), ffn.bank.slot_balance())
        expected = torch.zeros(2, SLOTS, 3, dtype=torch.float64)
        for row, picks in zip(x, chosen):
            scores = [ffn.key_tokens @ row, *(keys[slot, pick] @ row for slot, pick in enumerate(picks))]
            norm = torch.cat(scores).norm()
            for slot, pick in enumerate(picks):
                weights = torch.nn.functional.gelu(ffn.scale * scores[1 + slot] / norm).abs()
                expected[1, slot, pick] += weights @ values[slot, pick].norm(dim=1)
                expected[0, slot, pick] += 1
    torch.testing.assert_close(use.contributions, expected[1], rtol=1e-9, atol=1e-12)
    assert torch.equal(use.positions, expected[0])


def test_parts_of_the_rows_make_no_difference(monkeypatch):
    of = model(3)
    one = used(InitialSource(of, 0), of)
    monkeypatch.setattr(module, "SCORE_ELEMENTS", 1)
    for name, use in used(InitialSource(of, 0), of).items():
        assert torch.equal(use.positions, one[name].positions) and use.positions.sum() == SLOTS * IDS.numel()
        torch.testing.assert_close(use.contributions, one[name].contributions, rtol=1e-4, atol=1e-6)


def test_what_stays_and_what_is_merged():
    use = {NAME: Use(torch.tensor([[0.0, 0, 1, 5]]), torch.tensor([[2.0, 5, 1, 2]], dtype=torch.float64))}
    ways = {way: mixture[NAME][0].tolist() for way, mixture in mixtures(use, model(2)).items()}
    assert ways == {DROP: [[1, 0, 0, 0], [0, 1, 0, 0]], MERGE: [[0.5, 0.5, 0, 0], [0, 0, 0.25, 0.75]]}
    assert use[NAME].dropped_share(mixtures(use, model(2))[DROP][NAME]) == 0.3
    assert list(mixtures(use, model(3))) == [DROP]
    assert mixtures(use, model(1))[DROP][NAME][0].tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("left", [1, 2])
def test_means_are_read_by_any_range_with_every_state(left):
    large, small = model(4), model(left)
    old, generator = Trained(large, 7), torch.Generator().manual_seed(0)
    mixture = torch.rand(SLOTS, left, 4, generator=generator, dtype=torch.float64)
    source = CondensedSource(old, old_model=large, model=small, mixtures={NAME: mixture, "blocks.0.ffn": mixture})
    for name in ("key_tokens", "value_tokens") if left == 1 else ("key_tokens", "value_tokens", "router", "balance"):
        size = (SIZE if name.endswith("tokens") else 1) * (1 if name == "balance" else WIDTH)
        for state in STATES:
            candidates = old.read(f"{NAME}.bank.{name}", state, 0, SLOTS * 4 * size).view(SLOTS, 4, size).double()
            shares = mixture if name.endswith("tokens") else torch.full_like(mixture, 1 / 4)
            expected = (shares @ candidates).float().flatten()
            place = f"{NAME}.{name}" if left == 1 else f"{NAME}.bank.{name}"
            if left == 1:
                expected = torch.cat([old.read(place, state, 0, 5 * WIDTH), expected])
            for width in (len(expected), 7):
                torch.testing.assert_close(whole(source, place, state, len(expected), width), expected)


def test_a_model_that_diverged_is_refused():
    of = model(3)
    broken = build_model(of)
    with torch.no_grad():
        broken.blocks[1].ffn.bank.value_tokens[0] = torch.nan
        broken.blocks[1].ffn.bank.balance[0] = 1e9
    with pytest.raises(CheckpointError, match="blocks.1.ffn: what its candidates contribute is not finite"):
        measure_use(broken, [(IDS, IDS)])


def test_a_kind_without_candidates_is_named():
    with pytest.raises(UserError, match="--candidates: qkv has no candidates in this model. Choose ffn or proj."):
        target_counts("qkv=1", {"ffn": 4, "proj": 4}, "--candidates")


def test_numbers_that_are_too_small_are_answered_alike():
    for number in (-1, 0):
        with pytest.raises(UserError, match=f"--candidates: ffn is {number}, the checkpoint has 16. Choose 1 to 15"):
            target_counts(f"ffn={number}", {"ffn": 16}, "--candidates")
    with pytest.raises(UserError, match="'ffn=--1' is not KIND=N"):
        target_counts("ffn=--1", {"ffn": 16}, "--candidates")
