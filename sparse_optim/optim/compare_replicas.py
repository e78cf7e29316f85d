"""Whether the processes that train replicas hold the same weights, and the same optimizer.

DistributedDataParallel copies weights from the first process to the others when it is built, but
not those that it leaves out, nor an optimizer. Processes that differ would unmask different
entries, or wait for one another. They exchange digests, 8 bytes each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sparse_optim.delta._fingerprint import fingerprint
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.replicas import Replicas
from sparse_optim.engine.shards import digest_of


def compare_replicas(engine: Engine, replicas: Replicas, left_out: Sequence[str]) -> None:
    """Raise RuntimeError, in all processes, if they differ.

    Args:
        engine: with the weights, active entries, counts and schedule to compare.
        replicas: of processes that call this at the same time.
        left_out: names of the weights that DDP leaves out.
    """
    pool, active, device = engine.pool, engine.active, engine.pool.device
    shapes = [(tuple(param.shape), param.dtype) for param in pool.params]
    # First what says how many digests there are.
    whole = {
        "the weights that DistributedDataParallel leaves out": left_out,
        "the names or shapes of the parameters that are ranked": (pool.names, shapes),
        "the budget or the schedule": engine.targets.tolist(),
        "the steps that were taken": active.progress.tolist(),
        "when they unmask": (engine.loud, engine.calls, engine.completion.flags),
    }
    _check_equal({what: digest_of(value)[0] for what, value in whole.items()}, replicas, device)
    parts = {}
    for index, (name, param) in enumerate(zip(pool.names, pool.params, strict=True)):
        parts[name] = digest_of(fingerprint(param))[0]
        for field, values in active.segment(index).items():
            parts[f"{field} of the active entries of {name}"] = digest_of(fingerprint(values))[0]
    _check_equal(parts, replicas, device)


def _check_equal(digests: Mapping[str, int], replicas: Replicas, device: torch.device) -> None:
    everyone = replicas.gather(list(digests.values()), device)
    for what, *found in zip(digests, *everyone, strict=True):
        if len(set(found)) > 1:
            raise RuntimeError(
                f"the processes differ in {what}, and with sampled_backward=True nothing copies it "
                "from the first to the others: build the model and the optimizer alike in all, "
                "with the same seed, and load the same weights and the same checkpoint before "
                "step()"
            )
