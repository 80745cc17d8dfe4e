"""The batches of coming steps, prepared by a thread while the present step is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from megatron_tf.tasks.data import Batch, Loader

STEPS_AHEAD = 2


class Prefetcher:
    """A `Loader` that works ahead of its caller. The wrapped loader alone decides the samples of a step.

    On a GPU the batches are copied asynchronously from pinned memory. Use `close` at the end.
    """

    def __init__(self, loader: Loader, samples_per_step: int, device: torch.device):
        """`samples_per_step`: of all ranks, so that the step after the one at sample i begins at i +
        samples_per_step."""
        self._loader = loader
        self._samples_per_step = samples_per_step
        self._device = device
        self._pins = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "prefetch", self._attach)
        self._coming: deque[tuple[int, Future[list[Batch]]]] = deque()  # (first sample, its step's batches)

    def step_batches(self, first_sample: int) -> Iterator[Batch]:
        """As `Loader.step_batches`, on the device. Waits for the batches, and raises the error of preparing them.

        An error is raised when its step is asked for, not when the thread meets it.
        """
        if not self._coming or self._coming[0][0] != first_sample:  # the first step, or not the one that would be next
            self._forget()
            self._prepare(first_sample)
        while len(self._coming) <= STEPS_AHEAD:
            self._prepare(self._coming[-1][0] + self._samples_per_step)
        batches = self._coming.popleft()[1].result()
        return ((self._on_device(inputs), self._on_device(targets)) for inputs, targets in batches)

    def close(self) -> None:
        """Ends the thread after its present step."""
        self._forget()
        self._thread.shutdown()

    def _prepare(self, first_sample: int) -> None:
        self._coming.append((first_sample, self._thread.submit(self._read, first_sample)))

    def _forget(self) -> None:
        for _, batches in self._coming:
            batches.cancel()
        self._coming.clear()

    def _read(self, first_sample: int) -> list[Batch]:
        batches = list(self._loader.step_batches(first_sample))
        return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches] if self._pins else batches

    def _attach(self) -> None:
        # The current CUDA device is per thread.
        if self._pins:
            torch.cuda.set_device(self._device)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)
