"""Send the weights that a run has moved to copies of its base, version by version.

The optimizer knows which entries have moved since the base, so a patch needs no copy of the model
and no comparison: it holds the values of the active entries, and the positions of new ones.

    trainer     WeightPublisher.patch()    the next version, O(B)
                WeightPublisher.whole()    the same version for any receiver, O(B)
    server      WeightReceiver.receive()   check, then write; rollback() and reset() undo it
    between     bytes over any connection, or a PatchFolder
"""

from sparse_optim.publish._folder import PatchFolder
from sparse_optim.publish._manifest import Manifest, PatchError, TensorSpec
from sparse_optim.publish._patch import MissingVersionError, Patch, TensorPatch
from sparse_optim.publish._publisher import WeightPublisher
from sparse_optim.publish._receiver import WeightReceiver
from sparse_optim.publish._targets import runtime_views

__all__ = [
    "Manifest",
    "MissingVersionError",
    "Patch",
    "PatchError",
    "PatchFolder",
    "TensorPatch",
    "TensorSpec",
    "WeightPublisher",
    "WeightReceiver",
    "runtime_views",
]
