"""Count the bytes that the optimizer holds, from its tensors: python -m bench.memory

    limit = 24 bytes per entry of the budget + 8 bytes per tile + 64 KiB

The constant covers what grows with the number of tensors and with the quota of one step (16 bytes
per entry). A static selection unmasks its whole budget in one step and exceeds the limit by 8 bytes
per entry. State is what a checkpoint holds; work space is everything else that a step writes. Both
are allocated at construction. The parameters are not initialised, and only exp < 0 reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import allocations, backward, console, models, training
from bench.gpu_subjects import adamw_kinds
from bench.shapes import DTYPES, MEASURED, MODELS, Shape, num_entries
from bench.subjects import LR, unhashed
from sparse_optim import D3, IncrementalMaskedAdamW
from sparse_optim.backends.operands import num_bytes
from sparse_optim.backends.registry import BackendName

ENTRY_LIMIT, TILE_LIMIT, CONSTANT_LIMIT = 24, 8, 1 << 16  # bytes
BUDGETS = (320_000, 3_500_000)
QUOTA = 320


def build(
    shapes: Sequence[Shape], dtype: torch.dtype, budget: int, exp: float, quota: int = QUOTA
) -> IncrementalMaskedAdamW:
    """Build an optimizer over uninitialised parameters: only the sizes of its buffers matter."""
    params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
    steps = -(-budget // quota)
    return IncrementalMaskedAdamW(
        params,
        budget=budget,
        total_steps=steps,
        importance=D3(exp=exp, eps=1.0),
        unmask_steps=1.0,
    )


def measure(
    shapes: Sequence[Shape], dtype: torch.dtype, budget: int, exp: float, quota: int = QUOTA
) -> dict[str, Any]:
    """Count the bytes of state, work space and schedule, and compute the limit."""
    optimizer = build(shapes, dtype, budget, exp, quota)
    engine = optimizer.engine
    tiles, grad_bytes = engine.work.tiles.max.numel(), engine.active.grad.nbytes
    low_precision = dtype != torch.float32
    return {
        "budget": budget,
        "exp": exp,
        "quota": quota,
        "entries": num_entries(list(shapes)),
        "tiles": tiles,
        "state_bytes": num_bytes(engine.active) - grad_bytes,
        "work_bytes": num_bytes(engine.work) + grad_bytes,
        "schedule_bytes": engine.targets.nbytes,
        "limit_bytes": ENTRY_LIMIT * budget + TILE_LIMIT * tiles + CONSTANT_LIMIT,
        # Two common set-ups: moments in the parameters' dtype; float32 moments and master weights.
        "adamw_bytes": 2 * num_entries(list(shapes)) * torch.finfo(dtype).bits // 8,
        "adamw_float32_bytes": (12 if low_precision else 8) * num_entries(list(shapes)),
    }


def rows(
    models: Sequence[str], dtypes: Sequence[str], budgets: Sequence[int]
) -> list[dict[str, Any]]:
    """Measure every model, dtype, budget, and exp 0 and -1 (-1 keeps 4 more bytes per tile)."""
    return [
        {"model": model, "dtype": dtype, **measure(MODELS[model], DTYPES[dtype], budget, exp)}
        for model in models
        for dtype in dtypes
        for budget in budgets
        for exp in (0.0, -1.0)
    ]


def of_optimizers(
    params: Sequence[Tensor], backends: Sequence[BackendName], budget: int, quota: int
) -> list[dict[str, Any]]:
    """Measure what AdamW and our step on each backend hold after two steps, and their peak.

    Args:
        params: parameters with gradients, on the device to measure.
        backends: backends of our step.
    """
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = dict(adamw_kinds(params))
    for backend in backends:
        makers[backend] = partial(
            IncrementalMaskedAdamW, params, budget=budget, total_steps=-(-budget // quota),
            unmask_steps=1.0, max_grad_norm=1.0, backend=backend, lr=LR,
        )  # fmt: skip
    return [{"name": name, **_two_steps(make, params[0].device)} for name, make in makers.items()]


def _two_steps(
    make: Callable[[], torch.optim.Optimizer], device: torch.device
) -> dict[str, int | str]:
    """Return the bytes held and the peak, or the reason if it cannot be measured."""

    def run() -> torch.optim.Optimizer:
        with unhashed():
            optimizer = make()
        for _ in range(2):
            optimizer.step()
        return optimizer

    try:
        allocated = allocations.of_call(run, device)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    except RuntimeError as error:
        return {"failed": str(error).splitlines()[0]}
    return {"held_bytes": allocated.left, "step_peak_bytes": allocated.peak}


def held_bytes(row: dict[str, Any]) -> int:
    """Return the bytes of state and work space."""
    return int(row["state_bytes"] + row["work_bytes"])


def main() -> None:
    """Print the bytes of every case beside the limit and AdamW, or those of training steps."""
    parser = console.parser("memory", __doc__)
    parser.add_argument(
        "--backward", nargs="*", metavar="MODEL", choices=list(models.MODELS),
        help="show gradients alive in training steps with and without fuse_backward instead",
    )  # fmt: skip
    parser.add_argument(
        "--training", nargs="*", metavar="MODEL", choices=list(models.MODELS),
        help="show the memory and time of whole training steps instead",
    )  # fmt: skip
    parser.add_argument("--snapshot", type=Path, help="folder for memory snapshots "
                        "(docs.pytorch.org/memory_viz), with --training on CUDA")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.training is not None:
        print(training.table(training.rows(arguments.training or backward.MEASURED,
                                           arguments.snapshot)))  # fmt: skip
        return
    if arguments.backward is not None:
        for name in arguments.backward or backward.MEASURED:
            print(f"{name}\n{backward.table(backward.memory(backward.trainings(name)))}")
        return
    print(f"{'model':13} {'dtype':5} {'budget':>9} {'exp':>4} {'state':>7} {'work':>7} "
          f"{'B/entry':>8} {'limit':>7} {'AdamW':>8}  (MB)")  # fmt: skip
    for row in rows(MEASURED, list(DTYPES), BUDGETS):
        print(
            f"{row['model']:13} {row['dtype']:5} {row['budget']:9,} {row['exp']:4g} "
            f"{row['state_bytes'] / 1e6:7.2f} {row['work_bytes'] / 1e6:7.2f} "
            f"{held_bytes(row) / row['budget']:8.2f} {row['limit_bytes'] / 1e6:7.2f} "
            f"{row['adamw_bytes'] / 1e6:8.1f}"
        )


if __name__ == "__main__":
    main()
