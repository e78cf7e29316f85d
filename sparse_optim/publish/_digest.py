"""The digest of a version: what the model holds beyond its base, and which base."""

from __future__ import annotations

import hashlib

import xxhash

from sparse_optim.publish._patch import Patch

MAX_KEY_BYTES = hashlib.blake2b.MAX_KEY_SIZE


def digest_of(whole: Patch, key: bytes | None) -> str:
    """Of a whole patch, 32 hex digits: xxh3_128, or with a key blake2b, which nobody else can make.

    Its own `digest` is not looked at.
    """
    state = xxhash.xxh3_128() if key is None else hashlib.blake2b(key=key, digest_size=16)
    state.update(f"{whole.parent}/{whole.version}/".encode())
    for part in (whole.new, whole.position, whole.value, whole.dense):
        state.update(part.numpy().data)
    return state.hexdigest()


def check_key(key: bytes | None) -> bytes | None:
    """The key; ValueError if it is none."""
    if key is not None and not (isinstance(key, bytes) and 0 < len(key) <= MAX_KEY_BYTES):
        raise ValueError(f"key: expected 1 to {MAX_KEY_BYTES} bytes, got {type(key).__name__}")
    return key
