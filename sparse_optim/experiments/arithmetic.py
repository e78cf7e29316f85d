"""Arithmetic reasoning: a language model trained on Math10K, exact match on six test sets.

ID3 paper, section 5.3 and Table 5: Llama-7B with LoRA of rank 32 on query, key, value, up and down
projections, batches of 4, learning rate 3e-4, 3 epochs, seed 42, exp 0 (Table 7a). Data and
format are those of LLM-Adapters (Hu et al. 2023): a clone of that repository is a data folder. The
six sets are decoded there with 4 beams.

The paper trains no other language model. `--model` takes any decoder with modules of these names,
such as Qwen/Qwen2.5-0.5B, mtgv/MobileLLaMA-1.4B-Base or smollm2-135m; `--adapter-targets` names
others. Budgets are shares of the LoRA of rank 32: as many entries as ranks 2 and 4 have on the same
model.

Table 7b gives 80 steps between evaluations. Here the test sets are answered once, at the end, which
is what the table reports: they have 4,076 questions, and three epochs of Math10K have 7,500 steps,
so that 93 evaluations would take far longer than the training. `--eval-every 80` answers them
every 80 steps; `--eval-limit` takes a sample of each.

All training files in the data folder are read (also MAWPS, which has equations in place of
solutions). Training questions that occur in a test set are dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparse_optim.experiments import paper
from sparse_optim.experiments.presets import Block, Experiment, ExperimentError, Row, TaskPreset

TEST_SETS = ("AddSub", "MultiArith", "SingleEq", "gsm8k", "AQuA", "SVAMP")
LETTER_SETS = ("AQuA",)  # answers are option letters
TRAIN_FILES = ("math_10k.json", "ft-training_set/math_10k.json", "train.json", "mawps-train.json")
TEST_FILES = ("{}-test.json", "{}/test.json", "dataset/{}/test.json")

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n### Response:"
)

TOLERANCE = 1e-3  # of numbers, as in the benchmark

# Table 7a (as in LLM-Adapters), with alpha twice the rank.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

MATH10K = TaskPreset(
    "math10k",
    "",
    "causal-lm",
    "perplexity",
    max_length=256,
    split=None,
    epochs=3,
    batch_size=4,
    columns=TEST_SETS,
)

# As many entries as ranks 2 and 4 have: 3.5M and 7M of Llama-7B, the paper's budgets.
BUDGETS = ("6.25%", "12.5%")


def lora_row(method: str, rank: int, budget: str = "") -> Row:
    """A row of Table 5."""
    settings = {"adapter_targets": LORA_TARGETS}
    return Row(method, (3e-4,), budget, adapter="lora", rank=rank, settings=settings)


MATH = Experiment(
    name="math",
    title="Arithmetic reasoning, exact match",
    about="A language model on word problems (ID3 paper, Table 5); needs --data-folder.",
    model="huggyllama/llama-7b",
    blocks=(
        Block(
            (MATH10K,),
            (
                lora_row("id3", 32, BUDGETS[0]),
                lora_row("pafi", 32, BUDGETS[0]),
                lora_row("full", 2),
                lora_row("id3", 32, BUDGETS[1]),
                lora_row("pafi", 32, BUDGETS[1]),
                lora_row("full", 4),
                lora_row("full", 32),
            ),
        ),
    ),
    seeds=(42,),
    protocol="grid",
    kept=1,
    settings={"d3_exp": 0.0, "d3_eps": 1.0, "eval_batch_size": 4},
    paper=paper.MATH,
    paper_note="The paper: Agarwal et al. 2025, Table 5.",
)


def prompt_of(question: str) -> str:
    """The benchmark's prompt for a question."""
    return PROMPT.format(question.strip())


def number_in(text: str) -> float | None:
    """The last number in a response, thousands separators dropped; None without one.

    Examples:
        >>> number_in("3 + 4 = 7, so 1,007 in all.")
        1007.0
    """
    found = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return float(found[-1]) if found else None


def letter_in(text: str) -> str | None:
    """The option after "answer is", else the last single option letter.

    The benchmark takes the first capital A to E of a response, be it the article "A".

    Examples:
        >>> letter_in("A train takes 5 hours. The answer is (D).")
        'D'
    """
    said = re.findall(r"answer is:?\s*\(?([A-E])\b", text)
    alone = said or re.findall(r"\b([A-E])\b", text)
    return alone[-1] if alone else None


def is_right(test_set: str, answer: str, response: str) -> bool:
    """Exact match: the same option letter, or the same number within 0.001."""
    if test_set in LETTER_SETS:
        return letter_in(response) == answer.strip()
    guess = number_in(response)
    return guess is not None and abs(guess - float(answer)) <= TOLERANCE


def normalised(question: str) -> str:
    """Letters and digits in lower case: two spellings of one question are equal."""
    return " ".join(re.findall(r"[a-z0-9]+", question.lower()))


def without_leaks(rows: Iterable[dict[str, str]], tested: Iterable[str]) -> list[dict[str, str]]:
    """The training rows with questions that are in no test set."""
    seen = {normalised(question) for question in tested}
    return [row for row in rows if normalised(row["instruction"]) not in seen]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The questions of a JSON list.

    Raises:
        ExperimentError: the file has other content.
    """
    try:
        return [with_solution(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExperimentError(
            f"{path}: expected a JSON list of instruction, output and answer ({error!r})"
        ) from None


def with_solution(row: Mapping[str, Any]) -> dict[str, str]:
    """instruction, output and answer; a row of MAWPS has an equation in place of a solution."""
    if "original_text" in row:
        answer = str(row["ans"]).removesuffix(".0")
        output = f"{row['equation']}. The answer is {answer}."
        return {"instruction": row["original_text"].strip(), "output": output, "answer": answer}
    return {
        "instruction": row["instruction"].strip(),
        "output": row["output"].strip(),
        "answer": str(row["answer"]),
    }


def present(folder: Path, names: Iterable[str], about: str) -> list[Path]:
    """The files with these names that exist.

    Raises:
        ExperimentError: none exists.
    """
    names = list(names)
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        raise ExperimentError(f"--data-folder: {folder} has no {about} ({' or '.join(names)})")
    return paths


def read_tests(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The six test sets by name."""
    return {
        name: read_rows(
            present(folder, (f.format(name) for f in TEST_FILES), f"{name} test set")[0]
        )
        for name in TEST_SETS
    }


def write_training_set(folder: Path, target: Path) -> tuple[int, int]:
    """Write prompts and responses as JSON lines, without leaks; return how many were read and kept.

    Raises:
        ExperimentError: a file is missing, or every training question is in a test set.
    """
    files = present(folder, TRAIN_FILES, "training set")
    rows = [row for file in files for row in read_rows(file)]
    tested = [row["instruction"] for test in read_tests(folder).values() for row in test]
    kept = without_leaks(rows, tested)
    if not kept:
        raise ExperimentError(
            f"all {len(rows)} training questions in {folder} occur in the test sets; put others "
            f"into {TRAIN_FILES[0]}"
        )
    lines = (
        json.dumps({"prompt": prompt_of(row["instruction"]), "response": row["output"]}) + "\n"
        for row in kept
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")
    return len(rows), len(kept)
