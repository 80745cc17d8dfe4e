"""Builds a C file into a library on first use, keeps it in the user's cache folder if there is one, and loads it.

The name of the file contains the checksum of its bytes. So a library that was only half written, because a process was
killed or a machine lost power, is not loaded but built again. Several processes may build the same one in parallel.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_tf.caches import can_write, temporary_cache, user_cache
from megatron_tf.native import processor

COMPILERS = ("cc", "gcc", "clang")
BUILD_SECONDS = 60.0


class BuildError(Exception):
    """The library cannot be built or loaded. The message is the reason, in one line."""


def load_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The library of `source`, from the cache, or built with the C compiler of this machine ($CC) and `flags`.

    BuildError when neither is possible.
    """
    compiler = _compiler()
    identity = hashlib.sha256(repr((source.read_bytes(), compiler, tuple(flags), _processor())).encode()).hexdigest()
    name = f"{source.stem}_{identity[:16]}"
    caches = list(_cache_folders())
    for path in _kept(caches, name):
        with suppress(OSError):  # made for another libc, or on a file system mounted noexec
            return ctypes.CDLL(str(path))
    reasons = []
    # Cache folders come second: for a machine whose folder for temporary files is full, missing or mounted noexec.
    for place in (None, *caches):
        try:
            return _build(source, [*compiler, *flags], name, caches, place)
        except subprocess.CalledProcessError as error:
            reasons.append(f"{shlex.join(compiler)} could not build it: {error.stderr.strip()[-200:]}")
        except (OSError, subprocess.TimeoutExpired) as error:
            reasons.append(str(error))
    raise BuildError(reasons[0])


def _build(source: Path, command: Sequence[str], name: str, caches: Sequence[Path], place: Path | None) -> ctypes.CDLL:
    """Builds the library and keeps it in the first of `caches` that can be written.

    `place`: the folder in which a temporary folder is made; None: the one for temporary files.
    """
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        built = Path(folder, f"{name}.so")
        subprocess.run(
            [*command, str(source), "-o", str(built), "-lm"],
            check=True,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=BUILD_SECONDS,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
        )
        kept = next(filter(None, (_keep(built, cache, name) for cache in caches)), None)
        try:
            return ctypes.CDLL(str(built))  # stays loaded when its file is gone
        except OSError:
            if kept is None:
                raise
            return ctypes.CDLL(str(kept))


def _keep(built: Path, cache: Path, name: str) -> Path | None:
    """Copies a library into a cache. Returns its path there; None when the cache cannot be written."""
    content = built.read_bytes()
    kept = cache / f"{name}_{_checksum(content)}.so"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=cache, prefix=".")
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
            os.replace(partial, kept)
        except OSError:
            os.unlink(partial)
            raise
    except OSError:
        return None
    return kept


def _kept(caches: Sequence[Path], name: str) -> Iterator[Path]:
    """The complete libraries of `name` in the caches, by their checksums."""
    for cache in caches:
        candidates: list[Path] = []
        with suppress(OSError):
            candidates = sorted(cache.glob(f"{name}_*.so"))
        for path in candidates:
            with suppress(OSError):
                if path.stem == f"{name}_{_checksum(path.read_bytes())}":
                    yield path


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _compiler() -> list[str]:
    """The compiler's command as a list of words. $CC may have arguments (`gcc -m64`, `ccache gcc`), as in make."""
    chosen = os.environ.get("CC", "")
    try:
        words = shlex.split(chosen)
    except ValueError as error:
        raise BuildError(f"CC={chosen} cannot be read: {error}") from None
    if words:
        return words
    found = next(filter(None, map(shutil.which, COMPILERS)), None)
    if found is None:
        raise BuildError("no C compiler is installed")
    return [found]


def _cache_folders() -> Iterator[Path]:
    """The folders in which a library may be kept. The user's comes first, even if it can only be read."""
    cache = user_cache()
    if cache is not None:
        yield cache / "megatron_tf"
    if cache is None or not can_write(cache / "megatron_tf"):
        with suppress(OSError):
            yield temporary_cache("native")


def _processor() -> str:
    """The facts that -march=native depends on, because nodes with different processors may share a home folder."""
    facts = [f"{name}: {processor()[name]}" for name in ("model name", "flags", "Features") if name in processor()]
    return "\n".join(facts) or platform.processor()
