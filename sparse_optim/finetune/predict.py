"""Predict with a fine-tuned model, and evaluate it on other data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PredictionOutput

from sparse_optim.finetune.columns import (
    TEXT_PAIRS,
    TEXTS,
    TOKENS,
    Columns,
    first,
    first_pair,
    listed,
    match,
)
from sparse_optim.finetune.data import DataRequest, load_data, load_splits
from sparse_optim.finetune.encode import IGNORED
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import DATA_SUFFIXES
from sparse_optim.finetune.reuse import Tuned
from sparse_optim.finetune.spec import ModelSpec
from sparse_optim.finetune.splits import pick_evaluation, pick_split
from sparse_optim.finetune.tasks import TASKS, Task

TEXT_FILES = (".txt", *sorted(DATA_SUFFIXES))
NEW_TOKENS = 256  # that a causal LM writes at most
DUMMIES: dict[str, Any] = {"sequence-classification": 0, "regression": 0.0}


def evaluate(
    tuned: Tuned, dataset: str, *, split: str | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """The metrics of a fine-tuned model on a data set with labels.

    Columns are those of the training data, or guessed where the data set has other names.

    Args:
        dataset: as `-d` of `finetune`.
        split: of the data set (default: validation, dev or test, else train).

    Returns:
        loss and metrics as in metrics.json, `examples`, `cut`, `dropped` and `split`.

    Raises:
        FinetuneError: wrong data, or labels that the model does not have.
    """
    spec = tuned.spec
    splits = load_splits(DataRequest(dataset))
    split = split or evaluation_split(splits)
    found = pick_split(splits, split, "--split").column_names
    request = DataRequest(
        dataset,
        task=spec.task,
        columns=known_columns(spec.columns, found),
        train_split=split,
        eval_split=split,
        chat=spec.chat,
        labels=spec.labels,
    )
    data = load_data(request)
    task = TASKS[spec.task]
    encoded = task.encode_counted(data.evaluation, tuned.tokenizer, spec.max_length)
    names = list(spec.labels or ())
    output = _predict(tuned, encoded.examples, task, names, batch_size)
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    metrics = {
        name.removeprefix("test_"): value
        for name, value in (output.metrics or {}).items()
        if name.removeprefix("test_") not in timings
    }
    counts = {"examples": len(encoded.examples), "cut": encoded.cut, "dropped": encoded.dropped}
    return {**metrics, **counts, "split": split}


def evaluation_split(splits: DatasetDict) -> str:
    """The split to read if the user names none: validation, dev or test, else the first."""
    return pick_evaluation(splits, None, None) or next(iter(splits))


def known_columns(columns: Columns, found: Sequence[str]) -> Columns:
    """The columns of the training data that a data set has, too."""
    kept = {role: name for role, name in vars(columns).items() if name and match(name, found)}
    return Columns(**kept)


def read_texts(source: str, spec: ModelSpec, split: str | None = None) -> Dataset:
    """The texts of a file or data set, without labels: `text`, for pairs `text_pair` too.

    A .txt file has one text a line.

    Raises:
        FinetuneError: no such data, or no column of texts.
    """
    path = Path(source).expanduser()
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FinetuneError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        return as_examples(lines, None, spec)
    splits = load_splits(DataRequest(source))
    table = pick_split(splits, split or evaluation_split(splits), "--split")
    found = table.column_names
    known = known_columns(spec.columns, found)
    names = TOKENS if spec.task == "token-classification" else TEXTS
    pair = first_pair(TEXT_PAIRS, found) if known.text is None else None
    text = known.text or (pair or (first(names, found),))[0]
    second = known.text_pair or (pair[1] if pair else None)
    wanted = {"text": text, "text_pair": second if spec.columns.text_pair else None}
    lacking = [
        role for role, name in wanted.items() if name is None and getattr(spec.columns, role)
    ]
    if text is None or lacking:
        was = getattr(spec.columns, lacking[0] if lacking else "text")
        raise FinetuneError(
            f"{source}: no column of texts recognised (the model was trained on {was!r}); it has "
            + listed(found)
        )
    return Dataset.from_dict({role: table[name] for role, name in wanted.items() if name})


def as_examples(texts: Sequence[str], pairs: Sequence[str] | None, spec: ModelSpec) -> Dataset:
    """Texts as canonical columns: words for token classification, pairs where there are.

    Raises:
        FinetuneError: pairs for a model of single texts, or none for one of pairs.
    """
    if spec.task == "token-classification":
        return Dataset.from_dict({"text": [text.split() for text in texts]})
    wants_pairs = spec.columns.text_pair is not None and spec.task != "causal-lm"
    if wants_pairs and pairs is None:
        raise FinetuneError("the model was trained on pairs of texts: give two texts")
    if pairs is not None and not wants_pairs:
        raise FinetuneError("the model was trained on single texts: give one text")
    columns = {"text": list(texts)}
    return Dataset.from_dict(columns if pairs is None else columns | {"text_pair": list(pairs)})


def predict(tuned: Tuned, examples: Dataset, *, batch_size: int = 64) -> list[dict[str, Any]]:
    """Predictions for canonical texts, in their order.

    Returns:
        for each text `label` and `score` (its probability); `labels` and `scores` of all classes
        with a probability above one half; `value`; `words` and `tags` (None where the text was
        cut); or `response`.

    Raises:
        FinetuneError: a text without words.
    """
    spec, task = tuned.spec, TASKS[tuned.spec.task]
    if spec.task == "causal-lm":
        return [{"response": generate(tuned, row)} for row in examples]
    names = list(spec.labels or ())
    labels: list[Any] = [DUMMIES.get(spec.task, [0.0] * len(names))] * len(examples)
    if spec.task == "token-classification":
        labels = [[0] * len(words) for words in examples["text"]]
        if not all(labels):
            raise FinetuneError(f"row {labels.index([])} has no words")
    encoded = task.encode_counted(
        examples.add_column("label", labels), tuned.tokenizer, spec.max_length
    )
    output = _predict(tuned, encoded.examples, task, names, batch_size)
    firsts = np.asarray(output.label_ids) != IGNORED  # tokens that begin a word
    logits = torch.from_numpy(np.asarray(output.predictions, dtype=np.float32))
    if spec.task == "regression":
        return [{"value": float(value)} for value in logits.view(-1)]
    if spec.task == "multi-label-classification":
        return [
            {
                "labels": [name for name, p in zip(names, row, strict=True) if p > 0.5],
                "scores": {name: float(p) for name, p in zip(names, row, strict=True)},
            }
            for row in logits.sigmoid()
        ]
    if spec.task == "token-classification":
        return list(map(partial(_tagged, names), examples["text"], logits.argmax(-1), firsts))
    best = logits.softmax(-1).max(-1)
    return [
        {"label": names[int(index)], "score": float(score)}
        for score, index in zip(best.values, best.indices, strict=True)
    ]


def _tagged(
    names: list[str], words: list[str], classes: Tensor, firsts: np.ndarray
) -> dict[str, Any]:
    """The tags of a sentence; None for words beyond the maximum length."""
    tags: list[str | None] = [names[index] for index in classes[firsts].tolist()]
    return {"words": words, "tags": tags + [None] * (len(words) - len(tags))}


def generate(tuned: Tuned, row: dict[str, Any]) -> str:
    """What a causal LM writes after a prompt, greedily, in the form in which it was trained."""
    tokenizer, model, spec = tuned.tokenizer, tuned.model, tuned.spec
    text = "\n\n".join(part for part in (row["text"], row.get("text_pair")) if part)
    if spec.chat and tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": text}]
        encoded: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        encoded = tokenizer(f"{text}\n" if spec.columns.label else text, return_tensors="pt")
    encoded = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        written = model.generate(
            **encoded,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = written[0, encoded["input_ids"].shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)).strip()


def _predict(
    tuned: Tuned, examples: Dataset, task: Task, names: list[str], batch_size: int
) -> PredictionOutput:
    """Run the model over tokenised examples with the Trainer, as a job does when it evaluates."""

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        return task.compute(prediction, names)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=tuned.model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_eval_batch_size=batch_size,
                use_cpu=tuned.model.device.type == "cpu",
                dataloader_pin_memory=False,
                disable_tqdm=True,
                report_to="none",
            ),
            data_collator=task.collator(tuned.tokenizer),
            compute_metrics=compute,
            preprocess_logits_for_metrics=task.preprocess_logits,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.predict(examples)
