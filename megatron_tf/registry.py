"""Looks up objects by the names that configurations use, so that code outside the package can add its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to objects. The package's own objects are imported when they are first asked for."""

    def __init__(self, built_in: Mapping[str, str]):
        """`built_in`: name -> "module:attribute"."""
        self._built_in = dict(built_in)
        self._objects: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        """The object called `name`. KeyError when there is none."""
        if name not in self._objects:
            module, _, attribute = self._built_in[name].partition(":")
            self._objects[name] = getattr(import_module(module), attribute)
        return self._objects[name]

    def __contains__(self, name: object) -> bool:
        return name in self._built_in or name in self._objects

    def names(self) -> tuple[str, ...]:
        """All names, the package's own first, then in the order of their registration."""
        return tuple(dict.fromkeys((*self._built_in, *self._objects)))

    def added(self) -> dict[str, T]:
        """The objects that are not the package's own."""
        return {name: thing for name, thing in self._objects.items() if name not in self._built_in}

    def register(self, name: str, thing: T) -> None:
        """Adds `thing`. ValueError when the name is taken by another object."""
        if name in self and self[name] is not thing:
            raise ValueError(f"{name!r} is the name of {self[name]!r} already. Choose another name.")
        self._objects[name] = thing

    @contextmanager
    def registered(self, name: str, thing: T) -> Iterator[None]:
        """Registers `thing` for the time of the block only. ValueError when the name is taken by another object."""
        self.register(name, thing)
        try:
            yield
        finally:
            del self._objects[name]
