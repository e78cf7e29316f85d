"""Selective fine-tuning on top of adapters (peft's, or a bottleneck), and deltas as peft adapters.

    optimizer = IncrementalMaskedAdamW(adapter_groups(model), budget=..., total_steps=...)

ranks only the entries of the adapter. `export_shira` turns a delta of a plain model into an
adapter folder that `peft.PeftModel.from_pretrained` loads. `read_summary` makes a delta of what the
package `selective_optimizers` saved.
"""

from sparse_optim.integrations.adapters import (
    adapter_groups,
    adapter_parameters,
    zero_inactive_,
)
from sparse_optim.integrations.bottleneck import (
    BottleneckAdapter,
    add_bottlenecks,
    load_bottlenecks,
    save_bottlenecks,
)
from sparse_optim.integrations.selective_optimizers import read_summary
from sparse_optim.integrations.shira import ShiraExport, export_shira

__all__ = [
    "BottleneckAdapter",
    "ShiraExport",
    "adapter_groups",
    "adapter_parameters",
    "add_bottlenecks",
    "export_shira",
    "load_bottlenecks",
    "read_summary",
    "save_bottlenecks",
    "zero_inactive_",
]
