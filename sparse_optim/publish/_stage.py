"""The version that a patch makes of another one, checked in full. Versions are whole patches."""

from __future__ import annotations

from dataclasses import replace
from hmac import compare_digest

import torch
from torch import Tensor

from sparse_optim.publish._digest import digest_of
from sparse_optim.publish._manifest import PatchError
from sparse_optim.publish._patch import Patch


def check_whole(whole: Patch, key: bytes | None) -> None:
    """Raise PatchError unless a whole patch holds what its manifest and digest say."""
    if whole.parent != whole.full_manifest.digest:
        raise PatchError("it is whole, but does not build on its own base")
    whole.values(), whole.wholes()  # they check the numbers of bytes
    keys = entry_keys(whole)
    sizes = torch.tensor([spec.numel for spec in whole.full_manifest.sparse], dtype=torch.int64)
    beyond = (whole.position < 0) | (whole.position >= sizes.repeat_interleave(whole.new))
    if bool(beyond.any()) or bool((keys.diff() <= 0).any()):
        raise PatchError("positions that come twice, in another order, or beyond their tensor")
    if not compare_digest(digest_of(whole, key), whole.digest):
        raise PatchError(
            f"version {whole.version} is damaged or forged, or was made with another key: its "
            "digest is not that of its contents; ask for it again"
        )


def apply_increment(before: Patch, patch: Patch) -> tuple[Patch, Tensor]:
    """Add an increment to a version.

    Returns:
        the next version, not yet checked, and which of its entries are new, (n,) bool.

    Raises:
        PatchError: the increment has other tensors, or positions that are there already.
    """
    if patch.new.numel() != before.new.numel():
        raise PatchError(f"expected {before.new.numel()} sparse tensors, got {patch.new.numel()}")
    counts, position = before.new + patch.new, before.position
    is_new = torch.zeros(position.numel() + patch.position.numel(), dtype=torch.bool)
    if patch.position.numel():
        before_keys, keys = entry_keys(before), entry_keys(patch)
        at = torch.searchsorted(before_keys, keys)
        inside = at < before_keys.numel()
        if bool((keys.diff() <= 0).any()) or bool((before_keys[at[inside]] == keys[inside]).any()):
            raise PatchError("new positions that come twice, in another order, or are there")
        is_new[at + torch.arange(at.numel())] = True
        position = torch.empty(is_new.numel(), dtype=torch.int32)
        position[is_new], position[~is_new] = patch.position, before.position
    following = replace(
        before,
        run=patch.run, version=patch.version, digest=patch.digest, new=counts, position=position,
        value=patch.value, dense=patch.dense,
    )  # fmt: skip
    return following, is_new


def base_of(whole: Patch) -> Patch:
    """The base of a whole patch as a version: no entries."""
    return replace(
        whole,
        version=0, digest="", new=torch.zeros_like(whole.new), position=whole.position[:0],
        value=whole.value[:0], dense=whole.dense[:0],
    )  # fmt: skip


def entry_keys(patch: Patch) -> Tensor:
    """(tensor, position) of each entry in `position` as one number, (n,) int64."""
    tensor = torch.arange(patch.new.numel()).repeat_interleave(patch.new)
    return (tensor << 32) + patch.position
