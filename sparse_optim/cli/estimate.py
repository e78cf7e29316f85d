"""`sparse-optim estimate`: the memory of fine-tuning a model, and whether a GPU has enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.console import one_line_errors, plain, print_json, print_line, quiet_libraries
from sparse_optim.estimate import (
    GIB,
    GPUS,
    OPTIMIZERS,
    PLAIN,
    WAYS,
    Estimate,
    estimate_of,
    gpu_bytes,
    largest_batch,
)
from sparse_optim.finetune.config import parse_budget
from sparse_optim.finetune.errors import FinetuneError

if TYPE_CHECKING:
    from sparse_optim.footprint import Planner  # torch: the command imports it, --help does not

DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    """Add the command `estimate` to `app`."""
    app.command("estimate")(estimate)


def estimate(
    model: Annotated[str, typer.Option("--model", "-m", help="Built-in name, folder or hub id.")],
    budget: Annotated[
        str, typer.Option(help="Number of entries, or a share of all such as 1%.")
    ] = "1%",
    dtype: Annotated[str, typer.Option(help=f"Weights: {', '.join(DTYPES)}.")] = "bfloat16",
    gpu: Annotated[
        str, typer.Option(help=f"GPU to compare with, or its GiB (48): {', '.join(GPUS)}.")
    ] = "a100",
    sequence: Annotated[int, typer.Option(min=1, help="Sequence length in tokens.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of a forward pass.")] = 8,
    checkpointing: Annotated[bool, typer.Option(help="Recompute activations.")] = False,
    optimizer: Annotated[
        str | None, typer.Option(help=f"Optimizer: {', '.join(OPTIMIZERS)} (default: all).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Estimate memory from the model's config alone, without reading weights.

    All numbers are calculated, none is measured. Optimizers: adamw keeps moments in the model's
    dtype, adamw-fp32 in float32 with master values, adamw-8bit in one byte each; sparse is this
    package, in-backward the same with fuse_backward=True, sampled with sampled_backward=True on
    steps that unmask nothing (for the others see in-backward or sparse); lora is AdamW on LoRA of
    rank 16 on all Linear modules (the output layer of a language model left out), qlora the same on
    a base whose Linear modules are in 4 bits.

    Column step: gradients, activations and temporaries at their peak, counted on fake tensors. The
    CUDA context, work space within kernels and fragmentation come on top (1 GiB and 5%): "yes" fits
    with them, "tight" only without them. Column largest batch: the most examples of this length
    with which it fits ("yes").

    --json prints {"model", "dtype", "sequence", "batch", "checkpointing", "budget" (as asked),
    "gpu": {"name", "bytes"}, "rows": [{"optimizer", "entries" (trainable), "weights", "state",
    "step", "peak" (bytes), "fits" ("yes", "tight", "NO"), "largest_batch"}], "left_out":
    {optimizer: reason}}.
    """
    with one_line_errors():
        memory = gpu_bytes(gpu)
        if memory is None:
            raise FinetuneError(
                f"unknown --gpu {gpu!r}; known: {', '.join(GPUS)}; or its memory in GiB, such as 48"
            )
        _check("dtype", dtype, DTYPES)
        _check("optimizer", optimizer or OPTIMIZERS[0], OPTIMIZERS)
        share = parse_budget(budget)
        asked = Asked(model, dtype, sequence, batch, checkpointing, share, memory)
        rows, left_out = count(asked, OPTIMIZERS if optimizer is None else (optimizer,))
        if optimizer is not None and left_out:
            raise FinetuneError(f"{optimizer}: {left_out[optimizer]}")
        if as_json:
            print_json(as_document(asked, gpu, rows, left_out))
            return
        if not rows:
            name, reason = next(iter(left_out.items()))
            raise FinetuneError(f"cannot count a step of {model}: {name}: {reason}")
        Console().print(_table(rows, describe_gpu(gpu, memory)))
        for name, reason in left_out.items():
            print_line(f"{name} is left out: {reason}")


@dataclass(frozen=True)
class Asked:
    """What to estimate: `budget` is entries or a share, `memory` bytes of the GPU."""

    model: str
    dtype: str
    sequence: int
    batch: int
    checkpointing: bool
    budget: int | float
    memory: int


@dataclass(frozen=True)
class Row:
    """An estimate, and the largest batch that fits."""

    estimate: Estimate
    largest: int
    fits: str


def count(asked: Asked, optimizers: Sequence[str]) -> tuple[list[Row], dict[str, str]]:
    """Estimate each optimizer; return also the reasons why some are left out.

    Raises:
        FinetuneError: the model is not found, cannot be counted, or is too short.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
    )

    rows, left_out = [], {}
    planner, itemsize = make_planner(asked.model, asked.dtype, asked.sequence, asked.checkpointing)
    waiting = Console(stderr=True).status("")  # nothing unless stderr is a terminal
    for name in optimizers:
        try:
            with waiting:
                waiting.update(f"counting {name}")
                rows.append(_row(name, planner, itemsize, asked))
        except FinetuneError:  # of the model, so of all rows
            raise
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise FinetuneError(
                f"cannot count {asked.model}: its forward pass depends on values, not on shapes "
                f"alone ({error})"
            ) from error
        except (ModuleNotFoundError, ValueError, RuntimeError, TypeError) as error:
            # What a model's own code raises: the other rows may still be counted.
            left_out[name] = (str(error).splitlines() or [type(error).__name__])[0]
    return rows, left_out


def _row(name: str, planner: Planner, itemsize: int, asked: Asked) -> Row:
    def at(batch: int) -> Estimate:
        footprint = planner.footprint(WAYS.get(name, PLAIN), batch)
        share = asked.budget
        entries = share if isinstance(share, int) else round(share * footprint.entries)
        return estimate_of(name, footprint, itemsize, entries)

    found = at(asked.batch)
    largest = largest_batch(lambda batch: at(batch).peak, asked.memory, asked.batch)
    return Row(found, largest, found.fits(asked.memory))


def make_planner(name: str, dtype: str, sequence: int, checkpointing: bool) -> tuple[Planner, int]:
    """Prepare to count a model from its config; return it with the bytes of one entry.

    Raises:
        FinetuneError: the model is not found, or has fewer positions than `sequence`.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
    )

    from sparse_optim.finetune.config import MAX_TARGET_LENGTH
    from sparse_optim.finetune.models import check_writes, find_model, read_config
    from sparse_optim.footprint import Planner

    quiet_libraries()
    source = find_model(name)
    config: Any = read_config(source)
    longest = getattr(config, "max_position_embeddings", None) or sequence
    if sequence > longest:
        raise FinetuneError(f"--sequence {sequence} is beyond the model's {longest} positions")
    try:
        check_writes(source, "summarization" if config.is_encoder_decoder else "causal-lm")
        generates = True
    except FinetuneError:
        generates = False
    kind: Any = AutoModelForCausalLM if generates else AutoModelForSequenceClassification
    if generates and config.is_encoder_decoder:
        kind = AutoModelForSeq2SeqLM
    config.use_cache = False
    if not generates:
        config.problem_type = "single_label_classification"  # else DeBERTa looks at the labels

    def build() -> torch.nn.Module:
        try:
            model: torch.nn.Module = kind.from_config(config, dtype=getattr(torch, dtype)).train()
        except ValueError as error:  # no class of transformers for it
            reason = str(error).splitlines()[0]
            raise FinetuneError(f"cannot build {name} from its config: {reason}") from error
        if checkpointing:
            model.gradient_checkpointing_enable()  # type: ignore[operator]
        return model

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros((batch, sequence), dtype=torch.long)
        labels = ids[:, :MAX_TARGET_LENGTH] if config.is_encoder_decoder else ids
        labels = labels if generates else ids[:, 0]
        return {"input_ids": ids, "labels": labels.contiguous()}  # models call view(-1) on them

    return Planner(build, inputs), getattr(torch, dtype).itemsize


def _check(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise FinetuneError(f"unknown --{option} {value!r}; known: {', '.join(known)}")


def as_document(
    asked: Asked, gpu: str, rows: Sequence[Row], left_out: dict[str, str]
) -> dict[str, Any]:
    """The estimates as JSON values."""
    return {
        "model": asked.model,
        "dtype": asked.dtype,
        "sequence": asked.sequence,
        "batch": asked.batch,
        "checkpointing": asked.checkpointing,
        "budget": asked.budget,
        "gpu": {"name": gpu, "bytes": asked.memory},
        "rows": [
            {
                "optimizer": row.estimate.optimizer,
                "entries": row.estimate.footprint.entries,
                "weights": row.estimate.footprint.weights,
                "state": row.estimate.state,
                "step": row.estimate.footprint.step,
                "peak": row.estimate.peak,
                "fits": row.fits,
                "largest_batch": row.largest,
            }
            for row in rows
        ],
        "left_out": left_out,
    }


def describe_gpu(name: str, memory: int) -> str:
    """The GPU that --gpu names, or the size that it gives.

    Examples:
        >>> describe_gpu("H200", 140 * GIB), describe_gpu("8", 8 * GIB)
        ('the GPU (H200) has 140 GiB', 'a GPU of 8 GiB')
    """
    size = f"{memory / GIB:.4g} GiB"
    return f"a GPU of {size}" if name[:1].isdigit() else f"the GPU ({name}) has {size}"


def _table(rows: Sequence[Row], gpu: str) -> Table:
    """One row for each optimizer: sizes, whether the GPU has enough, and for which batch.

    Sizes are in MiB where GiB would leave two digits of the smallest one, or fewer.
    """
    smallest = min(min(row.estimate.state, row.estimate.footprint.weights) for row in rows)
    unit, size_of, digits = ("GiB", GIB, 3) if smallest >= GIB / 10 else ("MiB", GIB >> 10, 1)
    table = Table(title=plain(f"{unit}, calculated; {gpu}"))
    for column in ("optimizer", "weights", "state", "step", "peak", "fits", "largest\nbatch"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for row in rows:
        each = row.estimate
        sizes = (each.footprint.weights, each.state, each.footprint.step, each.peak)
        table.add_row(
            each.optimizer,
            *(f"{size / size_of:,.{digits}f}" for size in sizes),
            row.fits,
            f"{row.largest:,}" if row.largest else "none",
        )
    return table
