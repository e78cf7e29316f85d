"""Word problems: extraction of answers, leaks, generation; the command from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="experiments need the extra 'finetune'")

from experiment_cases import runner
from tiny_models import save_decoder
from transformers import AutoModelForCausalLM

from sparse_optim.experiments import generation
from sparse_optim.experiments.arithmetic import (
    MATH,
    MATH10K,
    TEST_SETS,
    is_right,
    letter_in,
    number_in,
    prompt_of,
    without_leaks,
    write_training_set,
)
from sparse_optim.experiments.generation import generate, locate_training
from sparse_optim.experiments.launch import make_runner
from sparse_optim.experiments.overrides import Choice, choose
from sparse_optim.experiments.presets import ExperimentError
from sparse_optim.experiments.runner import Decoding, RunOptions
from sparse_optim.finetune.models import find_model, load_tokenizer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("7 - 3 = 4 crayons. The answer is 4.", 4.0),
        ("3 + 6.8 = 9.8 gallons. The answer is 9.8.", 9.8),
        ("It costs $1,234,567.50 in all", 1234567.5),
        ("1, 2, 300", 300.0),
        ("The answer is -3", -3.0),
        ("no idea", None),
    ],
)
def test_the_last_number_counts(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A car goes to B. The answer is (D).", "D"),
        ("The answer is C", "C"),
        ("answer is: B", "B"),
        ("so it is E", "E"),
        ("Apples and Bananas", None),
    ],
)
def test_the_letter_after_the_answer_counts(text, letter):
    assert letter_in(text) == letter


def test_exact_match_is_by_value_or_by_letter():
    assert is_right("gsm8k", "15.0", "The answer is 15.")
    assert is_right("SingleEq", "0.16666666666666666", "The answer is 0.1667.")
    assert not is_right("SingleEq", "0.16666666666666666", "The answer is 0.17.")
    assert not is_right("gsm8k", "15.0", "")
    assert is_right("AQuA", "A", "The answer is (A).")
    assert not is_right("AQuA", "A", "The answer is 1.")


def question(text: str, answer: str) -> dict[str, str]:
    return {
        "instruction": text,
        "input": "",
        "output": f"\nThe answer is {answer}.",
        "answer": answer,
    }


def test_leaks_are_found_by_normalised_text():
    rows = [question("How many  CATS are there ?", "2"), question("How many dogs?", "3")]
    assert without_leaks(rows, [" How many cats are there? "]) == rows[1:]


def write_data(folder: Path, layout: str = "{}-test.json") -> Path:
    for name in TEST_SETS:
        path = folder / layout.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [question(f"{name} a b {i}", "A" if name == "AQuA" else str(i)) for i in range(3)]
        path.write_text(json.dumps(rows))
    train = [question(f"c d {i}", str(i)) for i in range(12)] + [question("gsm8k A B 1", "1")]
    (folder / "train.json").write_text(json.dumps(train))
    return folder


@pytest.mark.parametrize("layout", ["{}-test.json", "{}/test.json", "dataset/{}/test.json"])
def test_the_training_set_is_written_without_leaks(tmp_path, layout):
    folder = write_data(tmp_path / "data", layout)
    mawps = [{"original_text": "e f 9", "equation": "X=(4+5)", "ans": 9.0}]
    (folder / "mawps-train.json").write_text(json.dumps(mawps))
    assert write_training_set(folder, tmp_path / "train.jsonl") == (14, 13)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert rows[0] == {"prompt": prompt_of("c d 0"), "response": "The answer is 0."}
    assert rows[0]["prompt"].endswith("### Instruction:\nc d 0\n\n### Response:")
    assert rows[-1]["response"] == "X=(4+5). The answer is 9."


def test_a_training_set_that_is_all_leaked_is_refused(tmp_path):
    folder = write_data(tmp_path / "data")
    (folder / "train.json").write_text((folder / "SVAMP-test.json").read_text())
    with pytest.raises(ExperimentError, match=r"all 3 training questions.*occur in the test sets"):
        write_training_set(folder, tmp_path / "train.jsonl")
    assert not (tmp_path / "train.jsonl").exists()


def test_missing_and_strange_files_are_named(tmp_path):
    folder = write_data(tmp_path / "data")
    (folder / "AQuA-test.json").write_text('{"a": 1}')
    with pytest.raises(ExperimentError, match=r"AQuA-test.json: expected a JSON list"):
        write_training_set(folder, tmp_path / "train.jsonl")
    (folder / "AQuA-test.json").unlink()
    with pytest.raises(ExperimentError, match=r"no AQuA test set \(AQuA-test.json or AQuA/test"):
        write_training_set(folder, tmp_path / "train.jsonl")
    with pytest.raises(ExperimentError, match="math needs --data-folder"):
        locate_training(MATH10K, RunOptions(tmp_path))


def test_batched_answers_are_those_of_single_prompts(tmp_path):
    folder = save_decoder(tmp_path / "decoder")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(find_model(str(folder)))
    prompts = ["a b c d e f", "g", "h i j"]
    together = generate(model, tokenizer, prompts, 2, Decoding(1, 5))
    for prompt, answer in zip(prompts, together, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):  # greedy, by hand
            with torch.no_grad():
                following = model(ids).logits[0, -1].argmax()
            if following == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
        expected = ids[0, len(prompt.split()) :]
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)
    assert tokenizer.padding_side == "right"


def test_the_share_of_right_answers_of_each_set(tmp_path, monkeypatch):
    folder = write_data(tmp_path / "data")
    asked = []

    def answers(model, tokenizer, prompts, batch_size, decoding):
        asked.extend(prompts)
        return ["The answer is (A) 2." for _ in prompts]

    monkeypatch.setattr(generation, "generate", answers)
    trained = SimpleNamespace(loaded=SimpleNamespace(model=None))
    inputs = SimpleNamespace(tokenizer=None)
    config = SimpleNamespace(eval_batch_size=2, max_eval_examples=None)
    options = RunOptions(tmp_path, data_folder=folder)
    values = generation.measure_exact_match(config, inputs, trained, MATH10K, options)
    assert list(values) == list(TEST_SETS)
    assert values.pop("AQuA") == 1.0
    assert all(value == pytest.approx(1 / 3) for value in values.values())
    assert asked[0] == prompt_of("AddSub a b 0") + "\n"  # as in training
    config.max_eval_examples = 1
    asked.clear()
    generation.measure_exact_match(config, inputs, trained, MATH10K, options)
    assert len(asked) == 6


def test_answers_are_counted_at_each_due_step_before_the_last():
    model = SimpleNamespace(train=lambda: modes.append("train"))
    modes = []
    watcher = generation.AnswerWatcher(80, lambda model: {"AddSub": 0.25})
    for step in (79, 80, 81, 160, 240):
        state = SimpleNamespace(global_step=step, max_steps=240)
        watcher.on_step_end(None, state, None, model=model)
    assert watcher.rows == [{"step": 80, "AddSub": 0.25}, {"step": 160, "AddSub": 0.25}]
    assert modes == ["train", "train"]


def test_a_tiny_model_runs_the_whole_experiment(tmp_path):
    model = save_decoder(tmp_path / "decoder")
    choice = Choice(model=str(model), methods="id3,full", budgets="200", lrs="1e-2", steps=2)
    choice = replace(choice, eval_every=1)
    experiment, _ = choose(MATH, choice)
    options = RunOptions(
        tmp_path / "out",
        data_folder=write_data(tmp_path / "data"),
        eval_limit=1,
        decoding=Decoding(beams=2, new_tokens=3),
        extra={"cpu": True},
    )
    base = runner(experiment, tmp_path)
    run = make_runner(experiment, options, base.console)
    first, second = run.run()
    assert first["values"].keys() == set(TEST_SETS)
    assert (first["config"]["beams"], first["config"]["new_tokens"]) == (2, 3)
    assert first["active_entries"] == 200
    answered = [row for row in first["evaluations"] if "AddSub" in row]
    assert [row["step"] for row in answered] == [1, 2]
    assert answered[-1] == {"step": 2, **first["values"]}  # the table has the last
    assert [row["step"] for row in first["evaluations"] if "loss" in row] == [1, 2]
    assert first["config"]["max_eval_examples"] == 1
    assert second["active_entries"] == second["parameters"]
