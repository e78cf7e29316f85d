"""The digest of a version: what the model holds beyond its base, and which base."""

from __future__ import annotations

import hashlib

import xxhash

from sparse_optim.publish._patch import Patch

MAX_KEY_BYTES = hashlib.blake2b.MAX_KEY_SIZE


def digest_of(whole: Patch, key: bytes | None) -> str:
    """The digest that a whole patch should have, 32 hex digits.

    xxh3_128, which detects accidents; with a key blake2b, which cannot be forged without it.
    """
    state = xxhash.xxh3_128() if key is None else hashlib.blake2b(key=key, digest_size=16)
    state.update(f"{whole.run}/{whole.version}/{whole.full_manifest.text}/".encode())
    for part in (whole.new, whole.position, whole.value, whole.dense):
        state.update(part.numpy().data)
    return state.hexdigest()


def check_key(key: bytes | None) -> bytes | None:
    """Return the key; raise ValueError for what cannot be one."""
    if key is not None and not (isinstance(key, bytes) and 0 < len(key) <= MAX_KEY_BYTES):
        got = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise ValueError(f"key: expected 1 to {MAX_KEY_BYTES} bytes, got {got}")
    return key
