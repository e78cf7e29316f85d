"""The commands that use a result of `finetune`: `predict` and `evaluate`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.console import one_line_errors, plain, print_line, quiet_libraries

if TYPE_CHECKING:
    from sparse_optim.finetune.reuse import Tuned  # torch: the commands import it

Run = Annotated[
    str,
    typer.Argument(help="A folder that finetune wrote, its delta file, or the hub id of a run."),
]
Base = Annotated[
    str | None,
    typer.Option(help="Where the base model is now, if it is no longer where the run found it."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Batch size.")]
Split = Annotated[
    str | None, typer.Option(help="Split of the data (default: validation, dev or test).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("predict")(predict)
    app.command("evaluate")(evaluate)


def predict(
    run: Run,
    text: Annotated[
        str,
        typer.Argument(help="A text; or a file: .txt (a text a line), CSV, TSV, JSON, parquet."),
    ],
    pair: Annotated[
        str | None, typer.Argument(help="The second text, for a model of pairs of texts.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a CSV or JSON-lines file.")
    ] = None,
    base: Base = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
) -> None:
    """Predict with a fine-tuned model: one text, or all of a file.

    Prints label, probability and text, separated by tabs; with --json a JSON object a line.
    """
    with one_line_errors():
        if out is not None and out.suffix not in (".csv", ".jsonl"):
            raise typer.BadParameter("name a .csv or a .jsonl file", param_hint="--out")
        from sparse_optim.finetune import predict as predicting

        tuned = _load(run, base)
        if Path(text).suffix in predicting.TEXT_FILES and pair is None:
            examples = predicting.read_texts(text, tuned.spec, split)
        else:
            pairs = None if pair is None else [pair]
            examples = predicting.as_examples([text], pairs, tuned.spec)
        found = predicting.predict(tuned, examples, batch_size=batch_size)
        rows = [{**row, **values} for row, values in zip(examples, found, strict=True)]
        if out is not None:
            _write(rows, out)
            print_line(f"{out}: {len(rows):,} predictions")
            return
        for row in rows:
            if as_json:
                typer.echo(json.dumps(row))
            else:
                _print(row)


def evaluate(
    run: Run,
    data: Annotated[str, typer.Argument(help="Labelled data: as -d of finetune.")],
    base: Base = None,
    split: Split = None,
    batch_size: BatchSize = 64,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned model on labelled data."""
    with one_line_errors():
        from sparse_optim.finetune import predict as predicting

        found = predicting.evaluate(_load(run, base), data, split=split, batch_size=batch_size)
        if as_json:
            typer.echo(json.dumps(found))
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in found.items():
            shown = f"{value:.4f}" if isinstance(value, float) else f"{value}"
            table.add_row(plain(name), plain(shown))
        Console().print(table, highlight=False)


def _load(run: str, base: str | None) -> Tuned:
    """Load a result, on the GPU if there is one."""
    quiet_libraries()
    import torch

    from sparse_optim.finetune.reuse import load_tuned

    tuned = load_tuned(run, base)
    if torch.cuda.is_available():
        tuned.model.to("cuda")
    return tuned


def _print(row: dict[str, Any]) -> None:
    """Show what was found, then the text."""
    texts = [str(row[name]) for name in ("text", "text_pair") if name in row]
    if "response" in row:
        for line in row["response"].splitlines():
            print_line(line)
        return
    if "tags" in row:
        pairs = zip(row["words"], row["tags"], strict=True)
        cells = [" ".join(f"{word}/{tag or '?'}" for word, tag in pairs)]
    elif "labels" in row:
        cells = [", ".join(row["labels"]) or "-", *texts]
    elif "value" in row:
        cells = [f"{row['value']:.4f}", *texts]
    else:
        cells = [row["label"], f"{row['score']:.4f}", *texts]
    typer.echo("\t".join(plain(cell).plain for cell in cells))


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    from sparse_optim.files import replacing

    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        if out.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(
            {
                k: json.dumps(v, ensure_ascii=False) if isinstance(v, (list, dict)) else v
                for k, v in row.items()
            }
            for row in rows
        )
