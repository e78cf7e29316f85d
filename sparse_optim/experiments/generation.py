"""Train on word problems, let the model answer the test sets, count exact matches."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparse_optim.experiments.arithmetic import is_right, prompt_of, read_tests, write_training_set
from sparse_optim.experiments.presets import ExperimentError, TaskPreset
from sparse_optim.experiments.runner import AT_THE_END, Decoding, RunOptions, Watcher
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.inputs import Inputs
from sparse_optim.finetune.job import Trained
from sparse_optim.finetune.tasks import TASKS

logger = logging.getLogger(__name__)

SAMPLE_SEED = 0  # selects the questions that `--limit` or `--eval-limit` keeps


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
) -> dict[str, float]:
    """Share of right answers of a trained model on each test set."""
    return exact_match(config, inputs, trained.loaded.model, options)


def watch_exact_match(
    config: FinetuneConfig, inputs: Inputs, task: TaskPreset, options: RunOptions
) -> Watcher:
    """Measure the share of right answers every `task.eval_every` steps."""
    return AnswerWatcher(
        task.eval_every or AT_THE_END, partial(exact_match, config, inputs, options=options)
    )


class AnswerWatcher(Watcher):
    """Let the model answer the test sets while it is trained; its last step is left to the caller.

    Args:
        every: steps from one measurement to the next.
        measure: returns the values of a model, by column.
    """

    def __init__(self, every: int, measure: Callable[[PreTrainedModel], dict[str, float]]) -> None:
        super().__init__()
        self.every = every
        self.measure = measure

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **_: Any,
    ) -> None:
        """Measure, and put the model back into training mode."""
        is_due = state.global_step % self.every == 0 and state.global_step < state.max_steps
        if is_due and model is not None:
            self.rows.append({"step": state.global_step, **self.measure(model)})
            model.train()


def exact_match(
    config: FinetuneConfig, inputs: Inputs, model: PreTrainedModel, options: RunOptions
) -> dict[str, float]:
    """Share of right answers on each test set, or on a sample of it."""
    if options.data_folder is None:
        raise ExperimentError("math needs --data-folder")
    values = {}
    for name, rows in read_tests(options.data_folder).items():
        if config.max_eval_examples is not None and config.max_eval_examples < len(rows):
            rows = random.Random(SAMPLE_SEED).sample(rows, config.max_eval_examples)
        responses = generate(
            model,
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
