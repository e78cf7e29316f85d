"""Data in the columns, spellings and kinds of values that people have."""

from __future__ import annotations

import pytest

pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from data_rows import rows_of, write_jsonl

from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.data import DataRequest, load_data
from sparse_optim.finetune.errors import FinetuneError

CLASSES, SETS = "sequence-classification", "multi-label-classification"
WRITE = "summarization"
GUESSES = {
    "capitals": ({"Text": "t", "LABEL": ("x", "y")}, CLASSES, {"text": "t"}),
    "spaces": ({"Review Text": "t", "Rating": (1, 2)}, CLASSES, {"text": "t"}),
    "hyphens": (
        {"Text-A": "t", "text-b": "u", "intent": ("x", "y")},
        CLASSES,
        {"text": "t", "text_pair": "u"},
    ),
    "completion": ({"Prompt": "t", "Completion": "u"}, "causal-lm", {"text": "t", "label": "u"}),
    "problem": ({"problem": "t", "solution": "u"}, "causal-lm", {"text": "t", "label": "u"}),
    "numbers": ({"question": "t", "answer": 7}, "causal-lm", {"text": "t", "label": 7}),
    "documents": ({"document": "t", "Summary": "u", "id": "1"}, WRITE, {"text": "t", "label": "u"}),
    "articles": ({"article": "t", "highlights": "u"}, WRITE, {"text": "t", "label": "u"}),
    "dialogues": ({"dialogue": "t", "summary": "u"}, WRITE, {"text": "t", "label": "u"}),
    "titled": ({"text": "t", "summary": "u", "title": "v"}, WRITE, {"text": "t", "label": "u"}),
    "classes of texts with summaries": (
        {"text": "t", "summary": "u", "label": ("x", "y")},
        CLASSES,
        {"text": "t"},
    ),
    "several labels": ({"text": "t", "labels": (["x"], ["x", "y"])}, SETS, {"text": "t"}),
}


@pytest.mark.parametrize("name", GUESSES)
def test_columns_of_other_names_and_spellings_are_guessed(tmp_path, name):
    columns, task, expected = GUESSES[name]
    data = load_data(DataRequest(write_jsonl(tmp_path / "set.jsonl", rows_of(columns))))
    assert data.task == task
    row = data.train[0]
    assert {column: row[column] for column in row if column in expected} == expected


def test_named_columns_match_without_regard_to_case_exact_ones_first(tmp_path):
    rows = rows_of({"BODY": "t", "Body": "u", "Kind": ("x", "y")})
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    for name, text in (("Body", "u"), ("body", "t")):
        data = load_data(DataRequest(path, columns=Columns(name, None, "kind")))
        assert data.train[0]["text"] == text
    with pytest.raises(FinetuneError, match=r"no column 'kinds' \(did you mean 'Kind'\?\)"):
        load_data(DataRequest(path, columns=Columns("Body", None, "kinds")))


def test_columns_that_are_not_used_are_noted(tmp_path):
    rows = rows_of({"text": "t", "label": ("x", "y"), "idx": 0, "source": "web"})
    data = load_data(DataRequest(write_jsonl(tmp_path / "set.jsonl", rows)))
    assert data.columns == Columns("text", None, "label")
    assert data.notes == ("columns not used: 'idx', 'source'",)


def test_alpaca_input_and_its_missing_values(tmp_path):
    """`input` was dropped without a word; a CSV file has missing values for empty ones."""
    path = tmp_path / "set.csv"
    path.write_text("instruction,input,output\nAdd,1 and 2,3\nGo,,gone\nStop,,stopped\n")
    data = load_data(DataRequest(str(path)))
    asked = [row[0]["content"] for row in [*data.train["messages"], *data.evaluation["messages"]]]
    assert sorted(asked) == ["Add\n\n1 and 2", "Go", "Stop"]


ALPACA = {"instruction": "a", "input": "b", "output": "c"}
INSTRUCTION = Columns("instruction", "input", "output")
ANSWERS = {"question": "a", "answer": "b"}


@pytest.mark.parametrize(
    ("columns", "chosen", "expected"),
    [
        (ANSWERS, Columns("question"), Columns("question", None, "answer")),
        (ANSWERS, Columns(label="Answer"), Columns("question", None, "answer")),
        (ALPACA, Columns("instruction"), INSTRUCTION),
        (ALPACA, Columns(label="output"), INSTRUCTION),
        (ALPACA, Columns("instruction", None, "output"), INSTRUCTION),
        (ALPACA, Columns(None, "input"), INSTRUCTION),
        (ALPACA, Columns("input"), Columns("input", None, "output")),
        ({**ALPACA, "mine": "d"}, Columns(label="mine"), Columns("instruction", "input", "mine")),
        ({**ANSWERS, "body": "c"}, Columns("body"), Columns("body")),
    ],
)
def test_a_column_that_is_named_does_not_lose_its_pair(tmp_path, columns, chosen, expected):
    """A prompt was trained on without its response; Alpaca's `input` was dropped."""
    path = write_jsonl(tmp_path / "set.jsonl", rows_of(columns))
    assert load_data(DataRequest(path, task="causal-lm", columns=chosen)).columns == expected
    if chosen.label != "mine":  # it may be a class
        data = load_data(DataRequest(path, columns=chosen))
        assert (data.task, data.columns) == ("causal-lm", expected)


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        ({"question": "a", "answer": (0, 1)}, Columns(label="answer")),
        ({"question": "a", "passage": "b", "answer": ("x", "y")}, Columns(label="answer")),
        ({"question": "a", "why": "b", "answer": ("x", "y")}, Columns("question", "why", "answer")),
        ({"review": "a", "prompt": "b", "response": "c", "label": (0, 1)}, Columns("review")),
    ],
)
def test_classes_are_not_taken_for_responses(tmp_path, columns, chosen):
    path = write_jsonl(tmp_path / "set.jsonl", rows_of(columns))
    assert load_data(DataRequest(path, columns=chosen)).task == CLASSES


@pytest.mark.parametrize(
    ("columns", "chat", "turns"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, None, True),
        ({"instruction": "a", "input": "b", "output": "c"}, False, False),
        ({"prompt": "a", "response": "c"}, None, False),
        ({"prompt": "a", "response": "c"}, True, True),
    ],
)
def test_instructions_and_prompts_on_request_are_turns(tmp_path, columns, chat, turns):
    path = write_jsonl(tmp_path / "set.jsonl", rows_of(columns))
    row = load_data(DataRequest(path, chat=chat)).train[0]
    prompt = "a\n\nb" if "input" in columns else "a"
    if turns:
        assert [message["content"] for message in row["messages"]] == [prompt, "c"]
    else:
        assert row == {"text": prompt, "label": "c"}


@pytest.mark.parametrize(
    ("columns", "chat", "message"),
    [
        ({"text": "a", "label": ("x", "y")}, True, "are for causal-lm, and the task is sequence"),
        ({"text": "a"}, True, "--chat needs prompts and responses"),
        ({"messages": [{"role": "user", "content": "a"}]}, False, "--no-chat is for prompts"),
    ],
)
def test_chat_where_it_has_no_meaning_is_refused(tmp_path, columns, chat, message):
    path = write_jsonl(tmp_path / "set.jsonl", rows_of(columns))
    with pytest.raises(FinetuneError, match=message):
        load_data(DataRequest(path, chat=chat))


@pytest.mark.parametrize("column", ["messages", "Conversations"])
def test_conversations_are_messages_of_a_language_model(tmp_path, column):
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{column: chat, "score": 0.5}] * 3
    data = load_data(DataRequest(write_jsonl(tmp_path / "set.jsonl", rows)))
    assert data.task == "causal-lm"
    assert data.train[0]["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_several_labels_become_a_row_of_zeros_and_ones(tmp_path):
    rows = [{"text": str(i), "tags": [["b"], [], ["b", "a"]][i % 3]} for i in range(9)]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    data = load_data(DataRequest(path, columns=Columns(None, None, "tags")))
    assert (data.task, data.label_names) == ("multi-label-classification", ["a", "b"])
    seen = {row["text"]: row["label"] for part in (data.train, data.evaluation) for row in part}
    assert seen == {str(i): [[0.0, 1.0], [0.0, 0.0], [1.0, 1.0]][i % 3] for i in range(9)}


def test_whole_numbers_are_the_same_class_however_they_are_written(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": i} for i in (2, 10)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": i} for i in ("10", "2")])
    data = load_data(DataRequest(str(tmp_path)))
    assert data.label_names == ["2", "10"]
    assert (data.train["label"][:], data.evaluation["label"][:]) == ([0, 1], [1, 0])


def test_classes_that_training_never_has_are_noted(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a", "label": i} for i in ("x", "y")])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": i} for i in ("x", "z", "z")])
    data = load_data(DataRequest(str(tmp_path)))
    assert data.notes == (
        "classes that the evaluation examples have and no training example has: 'z' (2); the model "
        "cannot learn them",
    )


def test_empty_texts_are_kept_and_noted(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": t, "label": t} for t in ("", " \n", "a")])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a", "label": "a"}] * 2)
    data = load_data(DataRequest(str(tmp_path)))
    assert len(data.train) == 3
    assert data.notes[0] == "split 'train': column 'text' is empty in 2 of 3 rows; they are kept"


REFUSED = {
    "lists as responses": ({"prompt": "a", "response": ["b"]}, r"holds \['b'\].*expected text"),
    "mappings as responses": ({"question": "a", "answer": {"text": "b"}}, "expected text"),
    "truth as responses": ({"question": "a", "answer": True}, "holds True in row 0"),
    "mappings as texts": ({"text": {"a": "b"}}, "expected text .* or a list of messages"),
    "lists as texts": ({"text": ["a"]}, "expected text .* or a list of messages"),
    "lists written as text": ({"text": "['a', 'b']"}, "lists that are written as text"),
    "labels written as text": ({"text": "a", "label": ("['a']", "[]")}, "with real lists"),
    "unknown roles": ({"messages": [{"role": "me", "content": "a"}]}, "'messages': row 0: .*'me'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_text_is_refused(tmp_path, name):
    columns, message = REFUSED[name]
    path = write_jsonl(tmp_path / "set.jsonl", rows_of(columns))
    with pytest.raises(FinetuneError, match=message):
        load_data(DataRequest(path))


def test_keys_of_messages_that_are_not_used_are_noted(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    path = write_jsonl(tmp_path / "set.jsonl", [{"messages": chat}] * 3)
    expected = "split 'train': column 'messages': not used: the messages' 'weight'"
    assert load_data(DataRequest(path)).notes == (expected,)


def test_rows_with_missing_values_are_numbered_as_in_the_file(tmp_path):
    rows = [{"text": "a", "label": i % 2} for i in range(40)]
    rows[23]["text"] = None
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(FinetuneError, match=r"no value in 1 of 40 rows \(first: row 23\)"):
        load_data(DataRequest(path))


@pytest.mark.parametrize("label", ["nan", "inf"])
def test_regression_needs_finite_numbers(tmp_path, label):
    rows = [{"text": "a", "label": "1.5"}, {"text": "b", "label": label}]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    with pytest.raises(FinetuneError, match="needs finite numbers in column 'label': row 1 has"):
        load_data(DataRequest(path, task="regression"))


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        ("token-classification", Columns("t", "u", "x"), "is not for token-classification"),
        ("causal-lm", Columns("t", "u"), "--text-pair-column of causal-lm needs --label-column"),
    ],
)
def test_a_second_text_that_a_task_cannot_use_is_refused(tmp_path, task, columns, message):
    path = write_jsonl(tmp_path / "set.jsonl", [{"t": "a", "u": "b", "x": "c"}] * 3)
    with pytest.raises(FinetuneError, match=message):
        load_data(DataRequest(path, task=task, columns=columns))


def test_columns_of_summaries_are_named_or_asked_for(tmp_path):
    def load(columns, task=None, **chosen):
        path = write_jsonl(tmp_path / "set.jsonl", rows_of(columns))
        data = load_data(DataRequest(path, task=task, columns=Columns(**chosen)))
        return data.task, data.columns

    named = Columns("text", None, "summary")
    assert load({"text": "t", "summary": "u"}, label="summary") == (WRITE, named)
    assert load({"text": "t", "summary": "u"}, "causal-lm") == ("causal-lm", Columns("text"))
    pair = {"source": "t", "target": "u"}
    with pytest.raises(FinetuneError, match="fit several tasks: add --task summarization"):
        load(pair)
    assert load(pair, WRITE) == (WRITE, Columns("source", None, "target"))
    other = {"story": "t", "gist": "u", "summary": "v"}
    assert load(other, WRITE, text="story") == (WRITE, Columns("story", None, "summary"))
    chosen = Columns("story", None, "gist")
    assert load(other, WRITE, text="story", label="gist") == (WRITE, chosen)
    with pytest.raises(FinetuneError, match="no column of summaries recognised"):
        load({"text": "t", "gist": "u"}, WRITE)
    with pytest.raises(FinetuneError, match="--text-pair-column is not for summarization"):
        load(other, WRITE, text="story", text_pair="gist")
    with pytest.raises(FinetuneError, match="expected text"):
        load({"text": "t", "summary": 7}, WRITE)


def test_empty_texts_and_summaries_are_noted(tmp_path):
    rows = rows_of({"text": ("t", " "), "summary": "u"})
    rows[2]["summary"] = ""
    data = load_data(DataRequest(write_jsonl(tmp_path / "set.jsonl", rows)))
    assert data.notes == (
        "split 'train': column 'text' is empty in 2 of 4 rows; they are kept",
        "split 'train': column 'summary' is empty in 1 of 4 rows; they are kept",
    )
