"""Train on word problems, let the model answer the test sets, count exact matches."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_optim.experiments.arithmetic import is_right, prompt_of, read_tests, write_training_set
from sparse_optim.experiments.presets import ExperimentError, TaskPreset
from sparse_optim.experiments.runner import Decoding, RunOptions
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.job import Inputs, Trained
from sparse_optim.finetune.tasks import TASKS

logger = logging.getLogger(__name__)

SAMPLE_SEED = 0  # selects the questions that `--limit` keeps


def locate_training(task: TaskPreset, options: RunOptions) -> str:
    """Write the training set as prompts and responses to the output folder, once.

    Raises:
        ExperimentError: there is no data folder, or it lacks a file.
    """
    if options.data_folder is None:
        raise ExperimentError(
            "math needs --data-folder: a clone of LLM-Adapters, or a folder with math_10k.json or "
            "train.json, and AddSub-test.json and so on"
        )
    target = options.output / "data" / f"{task.name}.jsonl"
    if not target.exists():
        read, kept = write_training_set(options.data_folder, target)
        logger.info("%d of %d training questions are in no test set", kept, read)
    return str(target)


def measure_exact_match(
    config: FinetuneConfig, inputs: Inputs, trained: Trained, task: TaskPreset, options: RunOptions
) -> dict[str, Any]:
    """Share of right answers on each test set."""
    if options.data_folder is None:
        raise ExperimentError("math needs --data-folder")
    values = {}
    for name, rows in read_tests(options.data_folder).items():
        if options.limit is not None and options.limit < len(rows):
            rows = random.Random(SAMPLE_SEED).sample(rows, options.limit)
        responses = generate(
            trained.loaded.model,
            inputs.tokenizer,
            [prompt_of(row["instruction"]) + "\n" for row in rows],
            config.eval_batch_size or TASKS["causal-lm"].eval_batch_size,
            options.decoding,
        )
        right = [
            is_right(name, row["answer"], response)
            for row, response in zip(rows, responses, strict=True)
        ]
        values[name] = sum(right) / len(right)
    return values


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    batch_size: int,
    decoding: Decoding,
) -> list[str]:
    """The model's text after each prompt, by beam search; prompts are batched by length."""
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    responses = [""] * len(prompts)
    model.eval()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        encoded = left([prompts[index] for index in batch], padding=True, return_tensors="pt")
        encoded = encoded.to(model.device)
        with torch.no_grad():
            written = model.generate(  # type: ignore[operator]  # a mixin's method
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                max_new_tokens=decoding.new_tokens,
                num_beams=decoding.beams,
                do_sample=False,
                pad_token_id=left.pad_token_id,
                eos_token_id=left.eos_token_id,
            )
        new = written[:, encoded["input_ids"].shape[1] :]
        for index, text in zip(
            batch, left.batch_decode(new, skip_special_tokens=True), strict=True
        ):
            responses[index] = text
    return responses
