"""Analyse where a run spent its budget, as in section 6 of the ID3 paper (Figures 5 to 9).

`sparse_optim.analysis.recorder` (a transformers callback) and `.plots` (matplotlib) are imported
from their modules: they need the extra "finetune".
"""

from sparse_optim.analysis.compare import METRICS_FILE, Run, groups_of, load_runs
from sparse_optim.analysis.measures import (
    AllocationGrid,
    allocation_grid,
    sparsity_entropy,
    tensor_sparsity,
)
from sparse_optim.analysis.record import (
    ALLOCATION_FILE,
    AllocationRecord,
    RecordError,
    Snapshot,
    load_record,
    save_record,
)

__all__ = [
    "ALLOCATION_FILE",
    "METRICS_FILE",
    "AllocationGrid",
    "AllocationRecord",
    "RecordError",
    "Run",
    "Snapshot",
    "allocation_grid",
    "groups_of",
    "load_record",
    "load_runs",
    "save_record",
    "sparsity_entropy",
    "tensor_sparsity",
]
