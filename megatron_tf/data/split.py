"""Which documents are held out for validation."""

from __future__ import annotations

import hashlib


def is_held_out(name: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a function of `name` alone, true for `fraction` of all names.

    With the text as the name, copies of a document are never on both sides.
    """
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") < fraction * 2**64
