"""A store for the meeting of ranks whose calls always end. Torch's own wait for ever when its process is stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch.distributed as dist

from megatron_tf.errors import first_line

Result = TypeVar("Result")
# Torch raises one or the other, also after a timeout, depending on its version.
STORE_ERRORS = (dist.DistError, RuntimeError)
# `wait` polls at intervals of a tenth of the time waited so far, within these bounds, in seconds.
SHORTEST_PAUSE = 0.002
LONGEST_PAUSE = 1.0


class Unreachable(Exception):
    """The store, and so the process that holds it, does not answer."""


class PatientStore:
    """A store whose calls always end: with Unreachable when there is no answer within `timeout_seconds`."""

    def __init__(self, store: dist.Store, timeout_seconds: float):
        self._store = store
        self._timeout = timeout_seconds

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def set_once(self, key: str, value: str) -> str:
        """The value of `key`, which becomes `value` if there is none."""
        return self._ask(lambda: self._store.compare_set(key, "", value).decode())

    def get(self, key: str) -> str | None:
        """The value of `key`; None when it is not set."""
        return self._ask(lambda: self._store.get(key).decode() if self._store.check([key]) else None)

    def add(self, key: str, amount: int) -> int:
        """Adds `amount` to the counter `key`; returns its new value."""
        return self._ask(lambda: self._store.add(key, amount))

    def wait(self, key: str, seconds: float) -> bool:
        """Waits for `key`; returns whether it was set within `seconds`."""
        began = time.monotonic()
        # torch's own wait prints C++ messages when it times out.
        while not self._ask(lambda: self._store.check([key])):
            waited = time.monotonic() - began
            if waited >= seconds:
                return False
            time.sleep(min(max(waited / 10, SHORTEST_PAUSE), LONGEST_PAUSE, seconds - waited))
        return True

    def _ask(self, call: Callable[[], Result]) -> Result:
        outcome = within(self._timeout, "store", call)
        if outcome is None:
            raise Unreachable("its process is stopped, or cut off")
        if isinstance(outcome.error, STORE_ERRORS):
            raise Unreachable(first_line(outcome.error))
        return outcome.value()


class Outcome(Generic[Result]):
    """Makes a call, and holds what it returned or raised."""

    def __init__(self, call: Callable[[], Result]):
        self.error: BaseException | None = None
        self._values: list[Result] = []
        try:
            self._values.append(call())
        except BaseException as error:
            self.error = error

    def value(self) -> Result:
        """What the call returned. Raises what it raised."""
        if self.error is not None:
            raise self.error
        return self._values[0]


def within(seconds: float, name: str, call: Callable[[], Result]) -> Outcome[Result] | None:
    """The outcome of `call`; None if it takes longer than `seconds`. `name`: of its thread.

    A hanging call in torch cannot be cancelled, so it stays in its thread, which ends with the process.
    """
    outcomes: list[Outcome[Result]] = []
    thread = threading.Thread(target=lambda: outcomes.append(Outcome(call)), name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcomes[0] if outcomes else None
