"""The delta: the changes of a fine-tuning, as a file of a few megabytes.

    base + delta == the trained model        bit for bit

`Delta` holds it in memory; `save_delta` and `load_delta` write and read its file; `apply_delta`
writes it to a live model and can revert it; `merge` and `merge_folder` make a full checkpoint.
`merge_deltas` makes one delta of several.
"""

from sparse_optim.delta._algebra import merge_deltas, unmerge
from sparse_optim.delta._apply import (
    AppliedDelta,
    apply_delta,
    merge,
    revert_delta,
)
from sparse_optim.delta._changes import Change, tensor_changes
from sparse_optim.delta._conflicts import (
    Agreement,
    Common,
    Comparison,
    Conflict,
    compare_deltas,
    conflicts,
)
from sparse_optim.delta._content import content_fingerprint
from sparse_optim.delta._folder import MergedFolder, folder_tensors, merge_folder
from sparse_optim.delta._format import load_delta, save_delta
from sparse_optim.delta._series import Overlap, compose, increment, overlap
from sparse_optim.delta._switch import DeltaSwitcher
from sparse_optim.delta._types import Delta
from sparse_optim.delta._values import DeltaError, SparseValues

__all__ = [
    "Agreement",
    "AppliedDelta",
    "Change",
    "Common",
    "Comparison",
    "Conflict",
    "Delta",
    "DeltaError",
    "DeltaSwitcher",
    "MergedFolder",
    "Overlap",
    "SparseValues",
    "apply_delta",
    "compare_deltas",
    "compose",
    "conflicts",
    "content_fingerprint",
    "folder_tensors",
    "increment",
    "load_delta",
    "merge",
    "merge_deltas",
    "merge_folder",
    "overlap",
    "revert_delta",
    "save_delta",
    "tensor_changes",
    "unmerge",
]
