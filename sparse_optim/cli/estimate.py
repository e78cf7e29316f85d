"""`sparse-optim estimate`: the memory of fine-tuning a model, and whether a GPU has enough."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.console import one_line_errors
from sparse_optim.estimate import GIB, GPUS, OPTIMIZERS, Estimate, Footprint, estimates
from sparse_optim.finetune.config import parse_budget
from sparse_optim.finetune.errors import FinetuneError

DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    """Add the command `estimate` to `app`."""
    app.command("estimate")(estimate)


def estimate(
    model: Annotated[str, typer.Option("--model", "-m", help="Built-in name, folder or hub id.")],
    budget: Annotated[str, typer.Option(help="Number of entries, or a share such as 1%.")] = "1%",
    dtype: Annotated[str, typer.Option(help=f"Weights: {', '.join(DTYPES)}.")] = "bfloat16",
    gpu: Annotated[str, typer.Option(help=f"GPU to compare with: {', '.join(GPUS)}.")] = "a100",
    sequence: Annotated[int, typer.Option(min=1, help="Sequence length in tokens.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of a forward pass.")] = 8,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    optimizer: Annotated[
        str | None, typer.Option(help=f"Optimizer: {', '.join(OPTIMIZERS)} (default: all).")
    ] = None,
) -> None:
    """Estimate memory from the model's config alone, without reading weights.

    Optimizers: adamw keeps moments in the model's dtype, adamw-fp32 in float32 with master values,
    adamw-8bit in one byte each; sparse is this package, in-backward the same with
    fuse_backward=True, sampled with sampled_backward=True on steps that unmask nothing (for the
    others see in-backward or sparse). Column step: gradients, activations and temporaries at their
    peak, counted on fake tensors. The CUDA context, work space within kernels and fragmentation
    come on top (1 GiB and 5%): "yes" fits with them, "tight" only without them.
    """
    with one_line_errors():
        _check("gpu", gpu, tuple(GPUS))
        _check("dtype", dtype, DTYPES)
        _check("optimizer", optimizer or OPTIMIZERS[0], OPTIMIZERS)
        share = parse_budget(budget)
        footprint, itemsize = read_footprint(model, dtype, batch, sequence, checkpointing)
        entries = share if isinstance(share, int) else round(share * footprint.entries)
        wanted = OPTIMIZERS if optimizer is None else (optimizer,)
        Console().print(_table(estimates(footprint, itemsize, entries, wanted), gpu))


def read_footprint(
    name: str, dtype: str, batch: int, sequence: int, checkpointing: bool
) -> tuple[Footprint, int]:
    """Count a model's memory from its config; return it with the bytes of one entry.

    Raises:
        FinetuneError: the model is not found, or has fewer positions than `sequence`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from sparse_optim.finetune.models import check_generates, find_model
    from sparse_optim.footprint import footprint_of

    source = find_model(name)
    config = AutoConfig.from_pretrained(source.location, **source.gguf)
    longest = getattr(config, "max_position_embeddings", None) or sequence
    if sequence > longest:
        raise FinetuneError(f"--sequence {sequence} is beyond the model's {longest} positions")
    try:
        check_generates(source)
        generates = True
    except FinetuneError:
        generates = False
    kind = AutoModelForCausalLM if generates else AutoModelForSequenceClassification
    config.use_cache = False

    def build() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
        model = kind.from_config(config, dtype=getattr(torch, dtype)).train()  # type: ignore[no-untyped-call]
        if checkpointing:
            with warnings.catch_warnings():  # transformers renames the method
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
        ids = torch.zeros((batch, sequence), dtype=torch.long)
        labels = ids if generates else torch.zeros(batch, dtype=torch.long)
        return model, {"input_ids": ids, "labels": labels}

    return footprint_of(build), getattr(torch, dtype).itemsize


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise FinetuneError(f"unknown --{option} {value!r}; known: {', '.join(known)}")


def _table(found: list[Estimate], gpu: str) -> Table:
    """One row for each optimizer: sizes in GiB, and whether the GPU has enough."""
    table = Table(title=f"GiB; {gpu} has {GPUS[gpu] / GIB:.0f}")
    for column in ("optimizer", "weights", "state", "step", "peak", "fits"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for each in found:
        sizes = (each.footprint.weights, each.state, each.step, each.peak)
        table.add_row(
            each.optimizer, *(f"{size / GIB:.3f}" for size in sizes), each.fits(GPUS[gpu])
        )
    return table
