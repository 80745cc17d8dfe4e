from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from megatron_tf.errors import CheckpointError
from megatron_tf.growth.gram import BLOCK_ROWS, GramKeys


def keys(count: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def gram_keys(old: Tensor, added: int, factor: float = 1.5, **changes) -> GramKeys:
    chosen = {"seed": 3, "name": "blocks.0.ffn", **changes}
    flat, (count, width) = old.reshape(-1), old.shape
    return GramKeys(lambda a, b: flat[a:b], old_tokens=count, added_tokens=added, width=width, factor=factor, **chosen)


def rows_of(source: GramKeys, old: Tensor, added: int) -> Tensor:
    return source.read(old.numel(), old.numel() + added * old.shape[1]).view(added, -1)


@pytest.mark.parametrize(
    ("count", "added", "width"),
    [(40, 16, 16), (40, 700, 16), (16, 300, 16), (5, 5, 16), (7, 9, 16), (1, 1, 4), (3, 1, 1)],
)
def test_the_gram_matrix_is_the_wanted_one(count, added, width):
    old = keys(count, width)
    new = rows_of(gram_keys(old, added), old, added)
    wanted = 1.5 * old.double().T @ old.double()
    assert (new.T @ new - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def test_repeated_keys_have_the_wanted_gram_matrix_too():
    """KᵀK of rank 3 in 16 dimensions: its square root exists all the same."""
    old = keys(3, 16).repeat(20, 1)
    new = rows_of(gram_keys(old, 50), old, 50)
    wanted = 1.5 * old.double().T @ old.double()
    assert (new.T @ new - wanted).abs().max() <= 1e-12 * wanted.abs().max()


@pytest.mark.parametrize(("count", "added"), [(64, 128), (512, 512), (2, 9), (1, 9)])
def test_new_tokens_are_directions_of_their_own(count, added):
    """None is 0, none parallel to another or to an old one (in one dimension and few tokens they must be)."""
    old = keys(count, 32)
    new = rows_of(gram_keys(old, added), old, added)
    norms = new.norm(dim=1)
    assert (norms > 0).all()
    if count > 2:
        assert norms.max() / norms.min() < 3
        unit = torch.cat([old.double(), new])
        unit = unit / unit.norm(dim=1, keepdim=True)
        assert (unit @ unit.T - torch.eye(count + added)).abs().max() < 0.9


def test_seed_and_name_decide():
    old = keys(20, 8)
    first = rows_of(gram_keys(old, 30), old, 30)
    assert torch.equal(first, rows_of(gram_keys(old, 30), old, 30))
    for change in ({"seed": 4}, {"name": "blocks.1.ffn"}):
        assert not torch.allclose(first, rows_of(gram_keys(old, 30, **change), old, 30))


@pytest.mark.parametrize("width", [8, 96])
def test_any_range_by_any_reader_is_that_part_of_the_whole_to_the_last_bit(width):
    old, added = keys(50, width), 2 * BLOCK_ROWS + 77
    begin, end = old.numel(), old.numel() + added * width
    source = gram_keys(old, added)
    whole = source.read(begin, end)
    cuts = torch.randint(begin, end + 1, (20, 2), generator=torch.Generator().manual_seed(2)).sort().values.tolist()
    for start, stop in [*cuts, (begin, begin), (end - 1, end), (begin, begin + 1)]:
        for reader in (source, gram_keys(old, added)):
            assert torch.equal(reader.read(start, stop), whole[start - begin : stop - begin])


def test_the_number_of_threads_does_not_matter():
    script = (
        "import sys, torch, hashlib; torch.set_num_threads(int(sys.argv[1]))\n"
        "from megatron_tf.growth.gram import GramKeys\n"
        "old = torch.randn(700 * 384, generator=torch.Generator().manual_seed(0))\n"
        "new = GramKeys(lambda a, b: old[a:b], old_tokens=700, added_tokens=1000, width=384, factor=2.0, seed=1, "
        "name='x')\nprint(hashlib.sha256(new.read(700 * 384, 1700 * 384).numpy().tobytes()).hexdigest(), "
        "torch.get_num_threads())"
    )
    results = [
        subprocess.run(
            [sys.executable, "-c", script, threads], check=True, capture_output=True, text=True
        ).stdout.split()
        for threads in ("1", "2")
    ]
    assert results[0][0] == results[1][0]
    assert [threads for _, threads in results] == ["1", "2"], "the caller's number of threads is left as it was"


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_keys_of_a_training_that_diverged_are_refused(count, value):
    old = keys(count, 16)
    old[3, 2] = value
    with pytest.raises(CheckpointError, match="blocks.0.ffn.key_tokens: holds values that are infinite or no numbers"):
        rows_of(gram_keys(old, 50), old, 50)
