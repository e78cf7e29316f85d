"""Predict with a fine-tuned model, and evaluate it on other data."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PrinterCallback, Seq2SeqTrainer, Trainer
from transformers.trainer_utils import PredictionOutput

from sparse_optim.finetune.columns import (
    CONTEXTS,
    MESSAGES,
    PARALLEL,
    PROMPTS,
    SUMMARIES,
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
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.metrics import decode
from sparse_optim.finetune.reuse import Tuned
from sparse_optim.finetune.spec import ModelSpec, data_name
from sparse_optim.finetune.splits import pick_evaluation, pick_split
from sparse_optim.finetune.tasks import TASKS
from sparse_optim.finetune.trainer import arguments_class
from sparse_optim.finetune.values import check_values

NEW_TOKENS = 256  # that a causal LM writes at most
NOT_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def evaluate(
    tuned: Tuned,
    dataset: str,
    *,
    dataset_config: str | None = None,
    columns: Columns | None = None,
    split: str | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """The metrics of a fine-tuned model on a data set with labels.

    Args:
        dataset, dataset_config: as `-d` and `--dataset-config` of `finetune`.
        columns: default: those of the training data, or guessed where the data has other names.
        split: of the data set (default: validation, dev or test, else train).
        batch_size: default: the task's.

    Returns:
        the metrics as in metrics.json, the run's first; `examples`, `cut`, `dropped`, `split`, and
        `trained_on`: whether the model was trained on examples of this split.

    Raises:
        FinetuneError: wrong data, or labels that the model does not have.
    """
    spec = tuned.spec
    same = data_name(dataset) == spec.dataset
    dataset_config = dataset_config or (spec.dataset_config if same else None)
    splits = load_splits(DataRequest(dataset, dataset_config))
    split = split or evaluation_split(splits)
    found = pick_split(splits, split, "--split").column_names
    data = load_data(
        DataRequest(
            dataset,
            dataset_config,
            task=spec.task,
            columns=columns or known_columns(spec.columns, found),
            train_split=split,
            eval_split=split,
            chat=conversation_form(spec, found),
            labels=spec.labels,
        )
    )
    if spec.task != "causal-lm" and bool(data.columns.text_pair) != bool(spec.columns.text_pair):
        has = "pairs of texts" if data.columns.text_pair else "single texts"
        was = "pairs" if spec.columns.text_pair else "single texts"
        raise FinetuneError(
            f"{dataset} was read as {has}, and the model was trained on {was}: name the columns"
        )
    task = TASKS[spec.task]
    encoded = task.encode(data.evaluation, tuned.tokenizer, spec.lengths)
    output = run_model(tuned, encoded.examples, batch_size)
    metrics = {
        name.removeprefix("test_"): value
        for name, value in (output.metrics or {}).items()
        if name.removeprefix("test_") not in NOT_METRICS
    }
    metric = spec.metric or task.metrics[0]
    return {
        metric: metrics[metric],
        **metrics,
        "examples": len(encoded.examples),
        "cut": encoded.cut,
        **({"targets_cut": encoded.targets_cut} if task.writes else {}),
        "dropped": encoded.dropped,
        "split": split,
        "trained_on": same and split == spec.train_split,
    }


def conversation_form(spec: ModelSpec, found: Sequence[str]) -> bool | None:
    """`DataRequest.chat` for these columns.

    Raises:
        FinetuneError: conversations for a model of prompts, or texts for one of conversations.
    """
    if spec.task != "causal-lm":
        return None
    has_turns = first(MESSAGES, found) is not None
    if has_turns and not spec.chat:
        raise FinetuneError("the model was trained on texts or prompts, the data has conversations")
    if spec.chat and not (has_turns or first_pair(PROMPTS, found)):
        raise FinetuneError(
            "the model was trained on conversations, and the data has neither those nor prompts "
            f"with responses: it has {listed(found)}"
        )
    return spec.chat


def evaluation_split(splits: DatasetDict) -> str:
    """The split to read if the user names none: validation, dev or test, else the first."""
    return pick_evaluation(splits, None, None) or next(iter(splits))


def known_columns(columns: Columns, found: Sequence[str]) -> Columns:
    """The columns of the training data that a data set has, too, as it spells them."""
    return Columns(**{role: name and match(name, found) for role, name in vars(columns).items()})


def read_texts(source: str, spec: ModelSpec, split: str | None = None) -> Dataset:
    """The texts of a file or data set, without labels: `text`, for pairs `text_pair` too.

    A .txt file has one text a line.

    Raises:
        FinetuneError: no such data, no column of texts, or other values than the task needs.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".txt":
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise FinetuneError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        return as_examples(lines if lines[-1] else lines[:-1], None, spec)
    splits = load_splits(DataRequest(source))
    name = split or evaluation_split(splits)
    table = pick_split(splits, name, "--split")
    columns = text_columns(table.column_names, spec, source)
    wanted = {role: column for role, column in vars(columns).items() if column is not None}
    examples = Dataset.from_dict({role: table[column][:] for role, column in wanted.items()})
    check_values(examples, name, columns, spec.task)
    return examples


def text_columns(found: Sequence[str], spec: ModelSpec, source: str) -> Columns:
    """The columns of texts, and of their pairs or contexts if the model was trained on such."""
    known = known_columns(spec.columns, found)
    text, second = known.text, known.text_pair
    if spec.task == "causal-lm":
        prompts = tuple(prompt for prompt, _ in PROMPTS)
        text = text or first((*prompts, *TEXTS), found)
        needs_pair, second = False, second or first(CONTEXTS, found)
        second = second if spec.columns.text_pair and second != text else None
    else:
        needs_pair = spec.columns.text_pair is not None
        pair = first_pair(TEXT_PAIRS, found)
        if needs_pair and not (text and second) and pair:
            text, second = pair
        names: tuple[str, ...] = TOKENS if spec.task == "token-classification" else TEXTS
        if spec.task == "summarization":
            names = (*(name for name, _ in (*SUMMARIES, PARALLEL)), *TEXTS)
        text, second = text or first(names, found), second if needs_pair else None
    if text is None or (needs_pair and second is None):
        was = spec.columns.text_pair if text else spec.columns.text
        raise FinetuneError(
            f"{source}: no column of texts recognised (the model was trained on {was!r}); it has "
            + listed(found)
        )
    return Columns(text, second)


def as_examples(texts: Sequence[str], pairs: Sequence[str] | None, spec: ModelSpec) -> Dataset:
    """Texts as canonical columns: words for token classification, pairs where there are.

    The pair of a prompt is what it refers to (Alpaca's `input`).

    Raises:
        FinetuneError: no text, pairs for a model of single texts, or none for one of pairs.
    """
    if not texts:
        raise FinetuneError("there are no texts to predict for")
    if spec.task == "token-classification":
        return Dataset.from_dict({"text": [text.split() for text in texts]})
    takes_pairs = spec.columns.text_pair is not None
    if takes_pairs and pairs is None and spec.task != "causal-lm":
        raise FinetuneError("the model was trained on pairs of texts: give two texts")
    if pairs is not None and not takes_pairs:
        raise FinetuneError("the model was trained on single texts: give one text")
    columns = {"text": list(texts)}
    return Dataset.from_dict(columns if pairs is None else columns | {"text_pair": list(pairs)})


def predict(
    tuned: Tuned, examples: Dataset, *, batch_size: int | None = None
) -> list[dict[str, Any]]:
    """Predictions for canonical texts, in their order.

    Returns:
        for each text `label` and `score` (its probability); `labels` and `scores` of all classes
        with a probability above one half; `value`; `words` and `tags` (None where the text was
        cut, or a word has no token); `response`; or `summary`.
    """
    spec = tuned.spec
    if spec.task == "causal-lm":
        return [{"response": generate(tuned, row)} for row in examples]
    if spec.task == "token-classification":
        return tag(tuned, examples["text"][:], batch_size)
    names = list(spec.labels or ())
    unused: dict[str, Any] = {"sequence-classification": 0, "regression": 0.0, "summarization": ""}
    label = unused.get(spec.task, [0.0] * len(names))
    labelled = examples.add_column("label", [label] * len(examples))
    encoded = TASKS[spec.task].encode(labelled, tuned.tokenizer, spec.lengths)
    found = np.asarray(run_model(tuned, encoded.examples, batch_size).predictions)
    if spec.task == "summarization":
        return [{"summary": text} for text in decode(found, tuned.tokenizer)]
    logits = torch.from_numpy(found.astype(np.float32))
    if spec.task == "regression":
        return [{"value": float(value)} for value in logits.view(-1)]
    if spec.task == "multi-label-classification":
        rows = [dict(zip(names, row.tolist(), strict=True)) for row in logits.sigmoid()]
        return [{"labels": [n for n in names if row[n] > 0.5], "scores": row} for row in rows]
    best = logits.softmax(-1).max(-1)
    return [
        {"label": names[int(index)], "score": float(score)}
        for score, index in zip(best.values, best.indices, strict=True)
    ]


def tag(
    tuned: Tuned, sentences: Sequence[list[str]], batch_size: int | None
) -> list[dict[str, Any]]:
    """The tag of each word: that of its first token."""
    spec, names = tuned.spec, list(tuned.spec.labels or ())
    encoded = tuned.tokenizer(
        list(sentences), is_split_into_words=True, truncation=True, max_length=spec.max_length
    )
    firsts: list[list[int]] = []  # the words whose first token is there, in order
    for row in range(len(sentences)):
        words = [word for word in encoded.word_ids(row) if word is not None]
        firsts.append(list(dict.fromkeys(words)))
    kept = [row for row, words in enumerate(firsts) if words]
    found = [[None] * len(words) for words in sentences]  # type: list[list[str | None]]
    if kept:
        labelled = Dataset.from_dict(
            {
                "text": [sentences[row] for row in kept],
                "label": [[0] * len(sentences[row]) for row in kept],
            }
        )
        examples = TASKS[spec.task].encode(labelled, tuned.tokenizer, spec.lengths)
        output = run_model(tuned, examples.examples, batch_size)
        guesses = np.asarray(output.predictions).argmax(-1)
        marks = np.asarray(output.label_ids) == 0  # the label above, of each first token
        for row, guess, mark in zip(kept, guesses, marks, strict=True):
            for word, index in zip(firsts[row], guess[mark], strict=True):
                found[row][word] = names[int(index)]
    return [{"words": words, "tags": tags} for words, tags in zip(sentences, found, strict=True)]


def generate(tuned: Tuned, row: dict[str, Any]) -> str:
    """What a causal LM writes after a prompt, greedily, in the form in which it was trained."""
    tokenizer, model, spec = tuned.tokenizer, tuned.model, tuned.spec
    if not isinstance(row["text"], str):
        raise FinetuneError("predict takes prompts, not conversations: name a column of texts")
    text = "\n\n".join(part for part in (row["text"], row.get("text_pair")) if part)
    if spec.chat and tokenizer.chat_template is not None:
        turn = [{"role": "user", "content": text}]
        encoded: Any = tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        is_prompt = spec.chat or spec.columns.label is not None
        encoded = tokenizer(f"{text}\n" if is_prompt else text, return_tensors="pt")
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


def run_model(tuned: Tuned, examples: Dataset, batch_size: int | None) -> PredictionOutput:
    """Run the model over tokenised examples with the Trainer, as a job does when it evaluates."""
    task, names = TASKS[tuned.spec.task], list(tuned.spec.labels or ())
    with tempfile.TemporaryDirectory() as folder:
        trainer = (Seq2SeqTrainer if task.writes else Trainer)(
            model=tuned.model,
            args=arguments_class(task)(
                output_dir=folder,
                per_device_eval_batch_size=batch_size or task.eval_batch_size,
                use_cpu=tuned.model.device.type == "cpu",
                dataloader_pin_memory=False,
                disable_tqdm=True,
                report_to="none",
            ),
            processing_class=tuned.tokenizer,
            data_collator=task.collator(tuned.tokenizer, tuned.model),
            compute_metrics=task.scores(tuned.tokenizer, names),
            preprocess_logits_for_metrics=task.preprocess_logits,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.predict(examples)
