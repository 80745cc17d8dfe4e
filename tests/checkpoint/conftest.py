from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from live import PATIENCE_SECONDS
from torch import Tensor

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.state.optimizer_states import STATES

SHAPES = {"embedding.weight": (7, 5), "blocks.0.ffn.key_tokens": (11, 5), "final_norm.bias": (5,)}
State = dict[tuple[str, str], Tensor]


class Sandbox:
    """Small checkpoints of random state, saved by threads that stand for ranks."""

    def __init__(self, root: Path):
        self.root = root
        self.attempts = 0

    def state(self, seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> State:
        """Random bit patterns, so that NaN payloads, infinities and denormals are among them."""
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, shape in shapes.items():
            for kind in STATES:
                bits = torch.randint(-(2**31), 2**31, (int(torch.tensor(shape).prod()),), generator=generator)
                state[name, kind] = bits.to(torch.int32).view(torch.float32)
        return state

    def index(self, step: int = 10, shapes: dict[str, tuple[int, ...]] = SHAPES, **changes) -> CheckpointIndex:
        tensors = expected_tensors(shapes)
        index = CheckpointIndex(
            step=step,
            samples=8 * step,
            tokens=64 * step,
            model={"hidden_size": 5},
            scales={"blocks.0.ffn": 11**0.5},
            tensors=tensors,
            adam_steps={name: ((0, tensor.numel, step),) for name, tensor in tensors.items()},
        )
        return replace(index, **changes)

    def split(self, state: State, world_size: int, seed: int = 0) -> list[list[Piece]]:
        """Every element of `state` to exactly one of the ranks, cut at random places."""
        rng = random.Random(seed)
        shares: list[list[Piece]] = [[] for _ in range(world_size)]
        for (name, kind), values in state.items():
            cuts = sorted({0, len(values), *(rng.randint(0, len(values)) for _ in range(rng.randint(0, 5)))})
            for start, stop in zip(cuts, cuts[1:], strict=False):
                shares[rng.randrange(world_size)].append(Piece(name, kind, start, stop, values[start:stop]))
        return shares

    def save(
        self,
        shares: list[list[Piece]],
        index: CheckpointIndex | None = None,
        at: Callable[[int, str], None] = lambda rank, point: None,
        timeout_seconds: float = PATIENCE_SECONDS,
        ranks: list[int] | None = None,
    ) -> list[Path | Exception]:
        """Save on every rank at once; what each rank returned or raised."""
        self.attempts += 1
        token, index = f"attempt{self.attempts}", index or self.index()

        def one(rank: int) -> Path | Exception:
            try:
                return save_checkpoint(
                    self.root,
                    shares[rank],
                    index,
                    rank=rank,
                    world_size=len(shares),
                    token=token,
                    timeout_seconds=timeout_seconds,
                    at=lambda point: at(rank, point),
                )
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(shares)) as pool:
            return list(pool.map(one, ranks or range(len(shares))))

    def saved(self, step: int = 10, seed: int = 0, world_size: int = 1, **changes) -> Path:
        """One good checkpoint."""
        (path, *_) = self.save(self.split(self.state(seed), world_size, seed), self.index(step, **changes))
        assert isinstance(path, Path), path
        return path

    def entries(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "checkpoints")


@pytest.fixture
def three(sandbox: Sandbox) -> list[Path]:
    """Good checkpoints of steps 10, 20 and 30."""
    return [sandbox.saved(step=step, seed=step) for step in (10, 20, 30)]


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Turn one bit of a file around, at a byte counted from its start (or, negative, from its end)."""

    def flip_bit(path: Path, position: int) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return flip_bit
