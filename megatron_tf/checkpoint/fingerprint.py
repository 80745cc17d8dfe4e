"""What a checkpoint knows of its training data, compared with the data of now. See `data.loader.fingerprint`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def same_data(stored: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    """Whether samples go on in the same order: seed and sources are equal."""
    return stored.get("seed") == data.get("seed") and changed_sources(stored, data) is None


def changed_sources(stored: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[str, str] | None:
    """The sources of two fingerprints as text, or None where they are equal in all that both know of them.

    The text has digests, which tell files of different content apart. Older checkpoints have fewer fields.
    """
    then, now = stored.get("sources", ()), data.get("sources", ())
    known = [{key: value for key, value in source.items() if key in old} for old, source in zip(then, now)]
    if len(then) == len(now) and all(dict(old) == source for old, source in zip(then, known)):
        return None
    digest = "samples_sha256" if all("samples_sha256" in source for source in then) else "ends_sha256"

    def words(sources: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(
            f"{source.get('name')} ({source.get('tokens', 0):,} tokens, weight {source.get('weight', 1):g}, "
            f"{str(source.get(digest))[:8]})"
            for source in sources
        )

    return words(then), words(now)
