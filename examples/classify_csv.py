"""Classify the rows of a CSV file: what `sparse-optim finetune` does, from Python.

    python examples/classify_csv.py
    python examples/classify_csv.py --data mine.csv --model google-bert/bert-base-uncased

The same by the command:

    sparse-optim finetune -m minilm -d example-reviews.csv -o runs/mine --steps 80 --lr 7e-4
    sparse-optim predict runs/mine "A warm and funny film"

Needs the extra "finetune". Without --data, the built-in product reviews are written to
example-reviews.csv, if there is no such file yet.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from transformers import pipeline

import sparse_optim
from sparse_optim.finetune import FinetuneConfig
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.job import run

OUTPUT = Path("runs/example-reviews")  # this folder alone is overwritten by a second run


def write_reviews(path: Path) -> Path:
    """A CSV file with the columns text and label; a file that is there already is left alone."""
    if path.exists():
        return path
    reviews = load_builtin("amazon")["train"]
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label"])
        table.writerows(zip(reviews["text"], reviews["label"], strict=True))
    return path


def main(argv: Sequence[str] | None = None) -> None:
    """Train on the file, then predict with the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="built-in name, folder or hub id")
    parser.add_argument("--data", type=Path, help="CSV file with the columns text and label")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--text", default="A warm and funny film", help="a text to classify")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)

    data = args.data or write_reviews(Path("example-reviews.csv"))
    config = FinetuneConfig(
        model=args.model,
        dataset=str(data),
        output=args.output,
        steps=args.steps,
        lr=args.lr,
        overwrite=args.output == OUTPUT,
    )
    metrics = run(config).metrics  # a Console as the second argument shows progress

    model, tokenizer = sparse_optim.load_model(args.output)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    (answer,) = classify(args.text)
    name, value = metrics["metric"]["name"], metrics["metric"]["value"]
    print(
        f"{name} {value:.3f} on the rows held out after {args.steps} steps; "
        f"{args.text!r} is {answer['label']} (probability {answer['score']:.2f})."
    )


if __name__ == "__main__":
    main()
