"""A sparse tensor in a model that receives, at one version."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.delta._tensors import bits, same_bits
from sparse_optim.publish._manifest import PatchError
from sparse_optim.publish._targets import Located, Target, Views


@dataclass(frozen=True)
class Held:
    """A sparse tensor at one version.

    Attributes:
        located: where the tensor lies.
        position: (n,), int32, of the version's entries.
        places: of each target, the offsets of these entries in memory.
        original: (n,), the base's values of these entries.
    """

    located: Located
    position: Tensor
    places: list[Tensor]
    original: Tensor

    @staticmethod
    def base(located: Located) -> Held:
        """At the base, which the model must hold.

        Raises:
            PatchError: it does not.
        """
        for target in located.targets:
            if fingerprint(target.view) != located.spec.fingerprint:
                raise PatchError(
                    f"{located.spec.name!r} is not that of the publisher's base: load the weights "
                    "with which its training began"
                )
        none = torch.empty(0, dtype=torch.int64)
        places = [none.to(target.view.device) for target in located.targets]
        return Held(located, none.int(), places, torch.empty(0, dtype=located.spec.dtype))

    def at(self, position: Tensor, is_new: Tensor | None) -> Held:
        """At another version, of which nothing is written yet.

        Args:
            position: (n,), int32, of its entries.
            is_new: (n,), bool, which of them are new; None if old ones may be missing.
        """
        if torch.equal(position, self.position):
            return replace(self, position=position)  # a view of the old one would keep all of it
        if is_new is None:
            at = torch.searchsorted(self.position, position)
            known = at < self.position.numel()
            known[known.clone()] = self.position[at[known]] == position[known]
            kept = bits(self.original)[at[known]]
        else:
            known, kept = ~is_new, bits(self.original)
        original = bits(self.original.new_empty(position.numel()))
        original[known] = kept
        target = self.located.targets[0]
        original[~known] = bits(target.read(target.places(position[~known])))
        places = [target.places(position) for target in self.located.targets]
        return Held(self.located, position, places, original.view(self.original.dtype))

    def check(self, value: Tensor) -> None:
        """Raise PatchError unless the model holds the base with `value` at the entries."""
        for target, at in zip(self.located.targets, self.places, strict=True):
            base = Target(target.view.clone(memory_format=torch.contiguous_format))
            base.write(base.places(self.position), self.original)
            if (
                not same_bits(target.read(at), value)
                or fingerprint(base.view) != self.located.spec.fingerprint
            ):
                raise PatchError(outside_write(self.located.spec.name))

    def found_again(self, views: Views, value: Tensor) -> Held:
        """The same tensor in the memory that the model has now; raises as `check`."""
        located = self.located.anew(views)
        places = [target.places(self.position) for target in located.targets]
        held = replace(self, located=located, places=places)
        held.check(value)
        return held


def outside_write(name: str) -> str:
    """The message for a tensor that other code has changed."""
    return (
        f"other code has changed {name!r} since the last version (training, load_state_dict, a "
        "delta; buffers move in training mode: call model.eval()): undo that, or load the base "
        "again and build a new WeightReceiver"
    )
