"""Copies of a rank's state that are taken while training goes on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tf.checkpoint.format import BYTES_PER_ELEMENT
from megatron_tf.checkpoint.shards import BUFFER_BYTES
from megatron_tf.checkpoint.writer import Piece
from megatron_tf.errors import CheckpointError


class StateCopier:
    """Copies pieces into CPU memory that is allocated once: as much as the pieces, and for a GPU one bounded buffer."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._staging: Tensor | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-copy")

    def start(self, pieces: Sequence[Piece]) -> Future[list[Piece]]:
        """Begins to copy `pieces` as they are now, in a thread of its own; the copies are the future's result.

        The pieces must not change until the future is done, and its result is overwritten by the next `start`.
        CheckpointError when there is no memory for the copies.
        """
        device = next((piece.tensor.device for piece in pieces if piece.tensor.is_cuda), None)
        if device is None:
            return self._thread.submit(lambda: [replace(piece, tensor=self._copy(piece)) for piece in pieces])
        ready = torch.cuda.current_stream(device).record_event()  # after all that this step has queued
        return self._thread.submit(self._copy_from_gpu, pieces, device, ready)

    def _copy_from_gpu(self, pieces: Sequence[Piece], device: torch.device, ready: torch.cuda.Event) -> list[Piece]:
        """On a stream of its own, so that it runs in parallel with the kernels of training."""
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            if self._staging is None:
                self._staging = torch.empty(BUFFER_BYTES // BYTES_PER_ELEMENT, pin_memory=True)
            return [replace(piece, tensor=self._copy(piece, stream)) for piece in pieces]

    def _copy(self, piece: Piece, stream: torch.cuda.Stream | None = None) -> Tensor:
        copy = self._copies.get(piece.key)
        if copy is None:
            copy = self._copies[piece.key] = _allocate(piece)
        source = piece.tensor.detach()
        if stream is None:
            return copy.copy_(source)
        # Pinned memory is much faster to copy to, but torch rounds it up to powers of two: so only the buffer is.
        assert self._staging is not None
        for parts in zip(copy.split(len(self._staging)), source.split(len(self._staging))):
            staged = self._staging[: len(parts[0])].copy_(parts[1], non_blocking=True)
            stream.synchronize()
            parts[0].copy_(staged)
        return copy


def _allocate(piece: Piece) -> Tensor:
    try:
        return torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype)
    except RuntimeError as error:  # torch raises it when there is no memory
        raise CheckpointError(
            f"no memory for a copy of {piece.key}, {piece.tensor.nbytes:,} bytes. Set checkpoint.asynchronous=false "
            "to write without a copy, or give the host more memory"
        ) from error
