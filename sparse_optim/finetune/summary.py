"""Say what the command understood, before it takes time over it.

In three parts, each as soon as it is known: the request before anything slow is imported, the data
before torch is, and the run before its first step. This module imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_optim.finetune.adapter_kinds import ADAPTERS
from sparse_optim.finetune.builtin_data import DATASETS, MODELS
from sparse_optim.finetune.config import AUTO, FinetuneConfig
from sparse_optim.finetune.defaults import resolved

if TYPE_CHECKING:
    from sparse_optim.finetune.data import TaskData
    from sparse_optim.finetune.readings import Usage

LABEL_WIDTH = 8
SHOWN_LABELS = 6
WRITTEN = {"causal-lm": "response", "summarization": "summary"}  # what a model learns to write

Rows = Iterable[tuple[str, str]]


def show(console: Console, rows: Rows) -> None:
    """Print rows of a label and a text; long texts go on below themselves."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(width=LABEL_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        table.add_row(Text(label, "bold"), plain(text))
    console.print(table, highlight=False)


def plain(text: str) -> Text:
    """Text without markup. Names and metadata come from files of strangers: control characters,
    terminal escapes and lone surrogates are shown as Python escapes."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


POOLS = {"all": "entries", "linear": "Linear weights"}  # by --rank


def describe_request(config: FinetuneConfig) -> Rows:
    """Model, data and method, as the user named them and with defaults filled in.

    Args:
        config: with a known method and adapter.
    """
    yield "model", describe_model(config.model)
    about = f": {DATASETS[config.dataset].about}" if config.dataset in DATASETS else ""
    yield "data", config.dataset + about
    used, budget = resolved(config), ""
    if used.budget is not None:
        share = isinstance(used.budget, float)
        pool = POOLS.get(used.rank or "", "ranked entries")
        budget = f"{100 * used.budget:.4g}% of the {pool}" if share else f"{used.budget:,} entries"
    adapter = ""
    if config.adapter is not None:
        rank = config.adapter_rank or ADAPTERS[config.adapter].rank
        adapter = f"on {config.adapter}" + (f" of rank {rank}" if rank else "")
    parts = (
        f"{config.method} {adapter}".rstrip(),
        budget,
        f"lr {used.lr if used.lr == AUTO else format(used.lr, 'g')}",
        config.schedule,
    )
    yield "method", ", ".join(part for part in parts if part)


def describe_model(name: str) -> str:
    """A model's name, and what can be said about it without loading it."""
    if name in MODELS:
        return f"{name}: {MODELS[name].about}"
    path = Path(name).expanduser()
    if path.is_file():
        return f"{name}: {path.stat().st_size / 1e9:.2g} GB"
    if not path.is_dir():
        return f"{name} on the Hugging Face hub (no folder of this name here)"
    entries = stored_entries(path)
    return name if entries is None else f"{name}: {counted(entries)} parameters"


def stored_entries(folder: Path) -> int | None:
    """Entries of the floating-point tensors in a folder's safetensors files, read from their
    headers; None if there is no such file, or it cannot be read."""
    try:
        counts = [_entries_of(file) for file in folder.glob("model*.safetensors")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # loading says what is wrong
        return None
    return sum(counts) or None


def _entries_of(file: Path) -> int:
    """Of one file: 8 bytes with the length of a JSON object, then the object, then the tensors."""
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("cut short")
        header = json.loads(content.read(length))
    header.pop("__metadata__", None)
    floats = (about for about in header.values() if about["dtype"].startswith(("F", "BF")))
    return sum(math.prod(about["shape"]) for about in floats)


def describe_data(data: TaskData) -> Rows:
    """Splits, columns and task, with the columns and labels that were recognised."""
    yield (
        "splits",
        f"loaded {len(data.train):,} examples to train on, {len(data.evaluation):,} to evaluate "
        f"({data.eval_split})",
    )
    named = {
        "text": data.columns.text,
        "second text": data.columns.text_pair,
        WRITTEN.get(data.task, "label"): data.columns.label,
    }
    yield "columns", ", ".join(f"{use}: {name}" for use, name in named.items() if name is not None)
    names = data.label_names or []
    some = ", ".join(names[:SHOWN_LABELS]) + (", ..." if len(names) > SHOWN_LABELS else "")
    yield "task", data.task + (f", {len(names)} labels: {some}" if names else "")


def describe_run(usage: Usage, batch: str, steps: int, device: str) -> Rows:
    """What is trained and how.

    Args:
        usage: read from the optimizer.
        batch: what an optimizer step takes in all processes, such as "32 examples".
        steps: of the whole run.
        device: name of the device, and the number of processes if there are several.
    """
    parts = []
    if usage.ranked:
        share = usage.budget / usage.ranked
        parts.append(f"{usage.budget:,} of {usage.ranked:,} entries ({share:.2%})")
    if usage.dense:
        parts.append(f"{usage.dense:,} entries densely")
    yield "trains", ", and ".join(parts)
    kernels = f"backend {usage.backend}, {usage.gradients} gradients"
    yield "run", f"{counted_things(steps, 'step')} of {batch} on {device}, {kernels}"


def describe_series(rows: Sequence[Mapping[str, Any]], parts: int) -> str:
    """One line for the user: the value of the metric at each part of the budget.

    Args:
        rows: of the members, as in metrics.json.
        parts: that were asked for; several that one step reaches have one member.

    Example:
        >>> describe_series([{"share": 0.5, "value": 0.61, "step": 20}], 1)
        '0.6100 at 50% (step 20)'
    """
    values = ", ".join(
        f"{row['value']:.4f} at {row['share']:.0%} (step {row['step']:,})" for row in rows
    )
    if len(rows) == parts:
        return values
    counted = f"{len(rows)} of {parts} parts: see --every, --unmask-share and --steps"
    return f"{values}; {counted}" if rows else counted


def counted_things(number: int, thing: str, things: str | None = None) -> str:
    """A number and what it counts, in singular or plural.

    Examples:
        >>> counted_things(1, "step"), counted_things(2_000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def counted(entries: int) -> str:
    """A number of entries in thousands, millions or billions.

    Examples:
        >>> counted(22_713_216), counted(950)
        ('22.7M', '950')
    """
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if entries >= unit:
            return f"{entries / unit:.1f}{name}"
    return str(entries)
