"""Train replicas with sampled gradients, and compare them; run by tests/optim/test_replicas.py.

Usage: RANK=0 WORLD_SIZE=2 python replica_cases.py FOLDER
"""

from __future__ import annotations

import sys

import replica_changes as changes
import replica_runs as runs
import torch.distributed as dist
from processes import leave_group

RUNS = [
    *(lambda name=name: runs.compare(name) for name in runs.BUILDS),
    lambda: runs.compare("every 3", micro=3),
    lambda: runs.compare("every 3", poison=4),
    lambda: runs.compare("every 3", poison=3),
    lambda: runs.compare("every 3", gradient_as_bucket_view=True),
    lambda: runs.compare("every 3", static_graph=True),
    lambda: runs.resumed("weights alone"),
    # Three processes go on bit for bit where DDP does not rebuild its buckets: sums of three
    # numbers depend on their order, also with torch.optim.AdamW.
    lambda: runs.resumed("every 3", find_unused_parameters=True),
    runs.unequal_batches,
    runs.ranks_that_run_no_layer,
    runs.bytes_on_the_wire,
]
CHANGES = [
    changes.changed,
    changes.changed_before_the_first_pass,
    changes.layer_replaced,
    changes.set_is_taken_outside_of_dense_gradients,
    changes.zero_grad_of_the_wrapper,
    changes.not_averaged,
    changes.wrapped_too_early,
    changes.other_lists,
    changes.optimizer_is_gone,
    changes.another_optimizer_trains,
    changes.different_processes,
    changes.in_join,
]
IN_TWO = [lambda: runs.resumed("every 3"), runs.compiled, changes.compiled_inside]
IN_THREE = [changes.changed, changes.different_processes]


def main() -> None:
    address = f"file://{sys.argv[1]}/group"
    dist.init_process_group("gloo", init_method=address, rank=runs.RANK, world_size=runs.WORLD)
    for case in (*RUNS, *(IN_THREE if runs.WORLD == 3 else (*CHANGES, *IN_TWO))):
        case()
    sys.stdout.write("equal\n")
    leave_group()


if __name__ == "__main__":
    main()
