"""Fine-tune with transformers' Trainer: SelectiveTrainer tells the optimizer the length of the run.

    python examples/trainer.py
    python examples/trainer.py --model google-bert/bert-base-uncased --steps 300

Needs the extra "finetune"; MiniLM and the film reviews are built in.
"""

import argparse
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    TrainingArguments,
)

from sparse_optim import IncrementalMaskedAdamW, param_groups, save_delta
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.models import find_model
from sparse_optim.integrations.trainer import SelectiveTrainer

LABELS = ["negative", "positive"]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right answers."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, save the delta."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="minilm", help="built-in name, folder or hub id")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--test-examples", type=int, default=1000)
    parser.add_argument("--output", default="example-reviews.safetensors", help="file of the delta")
    args = parser.parse_args(argv)

    source = find_model(args.model).location
    tokenizer = AutoTokenizer.from_pretrained(source)
    splits = load_builtin("movies")  # of the hub: datasets.load_dataset("rotten_tomatoes")

    def encode(split: str, count: int | None = None) -> Dataset:
        table = splits[split]
        encoded = tokenizer(table["text"][:count], truncation=True, max_length=64)
        numbers = [LABELS.index(label) for label in table["label"][:count]]
        return Dataset.from_dict({**encoded, "labels": numbers})

    def build_optimizer(model: torch.nn.Module, total_steps: int) -> IncrementalMaskedAdamW:
        return IncrementalMaskedAdamW(
            param_groups(model, dense="classifier"),
            lr=args.lr,
            budget=0.01,
            total_steps=total_steps,
            max_grad_norm=1.0,
            model=model,
            sampled_backward=True,  # quiet steps compute gradients of active entries alone
            every=8,
        )

    torch.manual_seed(0)
    trainer = SelectiveTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(LABELS)),
        args=TrainingArguments(
            output_dir="runs/example-trainer",
            max_steps=args.steps,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
        ),
        train_dataset=encode("train"),
        eval_dataset=encode("test", args.test_examples),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        build_optimizer=build_optimizer,
    )
    trainer.train()
    right = trainer.evaluate()["eval_accuracy"]
    delta = trainer.raw_optimizer.delta(trainer.model)
    save_delta(delta, args.output)
    print(
        f"{right:.1%} of the test reviews are right after {args.steps} steps; "
        f"{args.output} holds {delta.num_entries:,} entries ({delta.nbytes / 1e6:.1f} MB)."
    )


if __name__ == "__main__":
    main()
