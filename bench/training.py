"""What a whole training step takes: python -m bench.memory --training [MODEL ...]

    weights, gradients, state   bytes held, counted from tensors
    step                        greatest bytes on top of weights and state, within one step:
                                activations, gradients, temporaries
    resident                    high-water mark of the process's resident memory (CPU), or of
                                torch's allocator (CUDA)

Each model and optimizer runs in a process of its own, on the GPU where there is one.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import allocations, backward, tables
from bench.models import MODELS

COLUMNS = ("weights", "gradients", "state", "step", "resident")


def rows(models: Sequence[str], snapshots: Path | None = None) -> list[dict[str, Any]]:
    """`measure` of every model and kind of optimizer, one after the other.

    Args:
        models: names in `bench.models`.
        snapshots: folder for torch's CUDA memory snapshots; None takes none.
    """
    context = multiprocessing.get_context("spawn")
    found = []
    for name in models:
        for kind in backward.KINDS:
            with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
                found.append(process.submit(measure, name, kind, snapshots).result())
    return found


def measure(
    name: str, kind: str, snapshots: Path | None = None, budget: int = backward.BUDGET
) -> dict[str, Any]:
    """Bytes of one model under one kind of optimizer, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MODELS[name].build().to(device)
    if snapshots is not None and device.type == "cuda":
        torch.cuda.memory._record_memory_history()
    under = backward.training(name, kind, model, budget)
    under.step()  # allocates dense AdamW's state
    params = list(model.parameters())
    row = {
        "model": name,
        "kind": kind,
        "device": str(device),
        "weights": sum(param.nbytes for param in params),
        "gradients": backward.gradient_bytes(under),
        "state": under.state_bytes,
        "step": allocations.of_call(under.step, device).peak,
        "resident": allocations.peak_bytes(device),
    }
    if snapshots is not None and device.type == "cuda":
        snapshots.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(snapshots / f"{name}-{kind}.pickle"))
    return row


def table(found: Sequence[dict[str, Any]]) -> str:
    """Megabytes, as Markdown."""
    lines = [
        [row["model"], row["kind"], *(f"{row[column] / 1e6:.1f}" for column in COLUMNS)]
        for row in found
    ]
    return tables.table(["model", "MB under", *COLUMNS], lines)
