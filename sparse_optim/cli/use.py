"""The commands that use a result of `finetune`: `predict`, `evaluate` and `push`."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparse_optim.cli.console import (
    one_line_errors,
    plain,
    print_json,
    print_line,
    quiet_libraries,
)
from sparse_optim.files import strict_json
from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.hub import DATA_SUFFIXES

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
BatchSize = Annotated[int | None, typer.Option(min=1, help="Batch size (default: the task's).")]
Column = Annotated[str | None, typer.Option(help="Column (default: as in the training data).")]
Split = Annotated[
    str | None, typer.Option(help="Split of the data (default: validation, dev or test).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

FACTS = {  # of `evaluate`, beside the metrics: what people read for the keys of --json
    "cut": "examples cut",
    "targets_cut": "summaries cut",
    "dropped": "examples dropped",
    "trained_on": "trained on this split",
}


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("predict")(predict)
    app.command("evaluate")(evaluate)
    app.command("push")(push)


def predict(
    run: Run,
    text: Annotated[
        str,
        typer.Argument(help="A text; or a file: .txt (a text a line), CSV, TSV, JSON, parquet."),
    ],
    pair: Annotated[
        str | None,
        typer.Argument(help="The second text of a pair, or what an instruction refers to."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write a CSV or JSON-lines file.")
    ] = None,
    base: Base = None,
    split: Split = None,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Predict with a fine-tuned model: one text, or all of a file.

    Prints label, probability and text, separated by tabs, or what the model writes; with --json a
    JSON object a line.
    """
    with one_line_errors():
        if out is not None and out.suffix not in (".csv", ".jsonl"):
            raise typer.BadParameter("name a .csv or a .jsonl file", param_hint="--out")
        from sparse_optim.finetune import predict as predicting

        tuned = _load(run, base)
        if _is_file(text, pair):
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
                typer.echo(strict_json(row))
            else:
                _print(row)


def evaluate(
    run: Run,
    data: Annotated[str, typer.Argument(help="Labelled data: as -d of finetune.")],
    base: Base = None,
    split: Split = None,
    dataset_config: Annotated[
        str | None, typer.Option(help="Configuration of a hub data set, such as rte.")
    ] = None,
    text_column: Column = None,
    text_pair_column: Column = None,
    label_column: Column = None,
    batch_size: BatchSize = None,
    as_json: AsJson = False,
) -> None:
    """Measure a fine-tuned model on labelled data."""
    with one_line_errors():
        from sparse_optim.finetune import predict as predicting
        from sparse_optim.finetune.metrics import describe_metric

        named, tuned = Columns(text_column, text_pair_column, label_column), _load(run, base)
        found = predicting.evaluate(
            tuned,
            data,
            dataset_config=dataset_config,
            columns=None if named == Columns() else named,
            split=split,
            batch_size=batch_size,
        )
        if found["trained_on"]:
            message = f"note: {run} was trained on examples of a split of this name: see --split"
            print_line(message, err=True)
        if as_json:
            print_json(found)
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in found.items():
            label = FACTS.get(name) or describe_metric(name, tuned.spec.task)
            table.add_row(plain(label), plain(_shown(value)))
        Console().print(table, highlight=False)


def push(
    run: Annotated[Path, typer.Argument(help="A folder that finetune wrote.")],
    repository: Annotated[str, typer.Argument(help="USER/NAME; made if there is none.")],
    private: Annotated[
        bool | None, typer.Option(help="Make a private repository (default: see your account).")
    ] = None,
) -> None:
    """Upload a result to the Hugging Face hub: model or adapter, delta and card."""
    with one_line_errors():
        quiet_libraries()
        from sparse_optim.finetune.push import push_to_hub

        print_line(push_to_hub(run, repository, private=private))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return (
        f"{value:.4f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )


def _is_file(text: str, pair: str | None) -> bool:
    """Whether a text is the name of a file: there is one, or the text looks like one."""
    if pair is not None:
        return False
    if Path(text).suffix.lower() in (".txt", *DATA_SUFFIXES) and " " not in text:
        return True
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


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
    for written in ("response", "summary"):
        if written in row:
            for line in row[written].splitlines():
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
