"""Results are used as their formats promise, and then are the model that was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="results of jobs need the extra 'finetune'")

import transformers
from finetune_jobs import config, make_folders
from tiny_models import save_encoder
from transformers import AutoTokenizer, pipeline
from typer.testing import CliRunner

import sparse_optim
from sparse_optim.cli.main import app
from sparse_optim.delta import load_delta, save_delta
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.card import PIPELINES
from sparse_optim.finetune.job import run
from sparse_optim.finetune.predict import as_examples, evaluate, predict, read_texts
from sparse_optim.finetune.reuse import load_tuned
from sparse_optim.finetune.spec import read_spec
from sparse_optim.finetune.tasks import TASKS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks transformers for a name that transformers deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

# model, data set, task; "pooled" is an encoder that declares mean pooling.
JOBS = [
    ("encoder", "sequence", "sequence-classification"),
    ("pooled", "sequence", "sequence-classification"),
    ("encoder", "several", "multi-label-classification"),
    ("pooled", "several", "multi-label-classification"),
    ("encoder", "regression", "regression"),
    ("pooled", "regression", "regression"),
    ("encoder", "token", "token-classification"),
    ("decoder", "sequence", "sequence-classification"),
    ("decoder", "generation", "causal-lm"),
    ("decoder", "prompt", "causal-lm"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    found = make_folders(root)
    pooled = save_encoder(root / "pooled")
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    lines = [json.loads(line) for line in (root / "sequence.jsonl").read_text().splitlines()]
    several = [
        {"text": row["text"], "labels": [letter for letter in "abc" if letter in row["text"]]}
        for row in lines
    ]
    (root / "several.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    return {**found, "pooled": str(pooled), "several": str(root / "several.jsonl")}


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """Result and folder of a job with --save-model, once for each."""
    kept = {}

    def get(model, dataset, **settings):
        key = (model, dataset, *settings.items())
        if key not in kept:
            output = tmp_path_factory.mktemp("runs") / "out"
            job = config(folders, output, model, dataset, lr=1e-2, **settings)
            kept[key] = run(job if job.adapter else replace(job, save_model=True))
        return kept[key]

    return get


def outputs(model, task):
    torch.manual_seed(0)
    ids = torch.randint(5, 13, (3, 7))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def check_same(found, expected, task):
    """The same bits, and the same outputs up to how memory is aligned."""
    tensors = expected.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.state_dict().items())
    torch.testing.assert_close(outputs(found, task), outputs(expected, task), rtol=0, atol=1e-6)


def auto_class(task):
    return getattr(transformers, TASKS[task].model_class)


@pytest.mark.parametrize(("model", "dataset", "task"), JOBS)
def test_every_way_to_load_a_result_gives_the_trained_model(
    finished, folders, tmp_path, model, dataset, task
):
    result = finished(model, dataset)
    assert result.metrics["task"] == task
    expected = outputs(result.model, task)

    loaded, tokenizer = sparse_optim.load_model(result.output)
    assert torch.equal(outputs(loaded, task), expected)
    assert loaded.config.id2label == result.model.config.id2label
    assert (
        tokenizer("a b")["input_ids"]
        == AutoTokenizer.from_pretrained(folders[model])("a b")["input_ids"]
    )

    own = {"trust_remote_code": True} if model == "pooled" else {}
    whole = result.output / "model"
    check_same(auto_class(task).from_pretrained(whole, **own), result.model, task)

    applied = CliRunner().invoke(
        app, ["apply", folders[model], str(result.output), str(tmp_path / "applied")]
    )
    assert applied.exit_code == 0, applied.output
    again = auto_class(task).from_pretrained(tmp_path / "applied", **own)
    check_same(again, result.model, task)
    assert again.config.id2label == result.model.config.id2label
    assert TASKS[task].problem_type in (None, again.config.problem_type)


@pytest.mark.parametrize(("model", "dataset", "task"), JOBS)
def test_a_loaded_result_has_the_metric_of_its_run(finished, folders, model, dataset, task):
    """On the held-out rows, which are the same for every job on the data set."""
    result = finished(model, dataset)
    tuned = load_tuned(result.output)
    data = sparse_optim_data(folders[dataset], task)
    name = result.metrics["metric"]["name"]
    found = evaluate(tuned, data, batch_size=64)
    assert found[name] == pytest.approx(result.metrics["metric"]["value"], rel=1e-5)
    assert found["examples"] == result.metrics["data"]["eval_examples"] == 16


def sparse_optim_data(path, task):
    """A file with the rows that a job on this file holds out."""
    from pathlib import Path

    from datasets import load_dataset

    from sparse_optim.finetune.labels import class_names
    from sparse_optim.finetune.splits import hold_out

    rows = load_dataset("json", data_files=path)["train"]
    classes = class_names(rows) if task == "sequence-classification" else None
    held = hold_out(rows, 0.25, classes)[1]
    target = Path(path).with_suffix(".held.jsonl")
    held.to_json(str(target))
    return str(target)


@pytest.mark.parametrize(("model", "dataset", "task"), JOBS)
def test_pipelines_predict_what_predict_does(finished, model, dataset, task):
    result = finished(model, dataset)
    tuned = load_tuned(result.output)
    texts = ["a b c", "d e f g h"]
    found = predict(tuned, as_examples(texts, None, tuned.spec))
    assert len(found) == 2
    own = {"trust_remote_code": True} if model == "pooled" else {}
    pipe = pipeline(PIPELINES[task], str(result.output / "model"), device="cpu", **own)
    if task == "sequence-classification":
        theirs = pipe(texts)
        assert [row["label"] for row in found] == [row["label"] for row in theirs]
        for ours, other in zip(found, theirs, strict=True):
            assert ours["score"] == pytest.approx(other["score"], abs=1e-5)
    elif task == "multi-label-classification":
        for ours, other in zip(found, pipe(texts, top_k=None), strict=True):
            theirs = {row["label"]: row["score"] for row in other}
            assert ours["scores"] == pytest.approx(theirs, abs=1e-5)
            assert ours["labels"] == [name for name in ours["scores"] if theirs[name] > 0.5]
    elif task == "regression":
        theirs = [row["score"] for row in pipe(texts)]
        assert [row["value"] for row in found] == pytest.approx(theirs, abs=1e-5)
    elif task == "token-classification":
        for ours, text in zip(found, texts, strict=True):
            other = {row["index"] - 1: row["entity"] for row in pipe(text, ignore_labels=[])}
            assert ours["words"] == text.split()
            assert ours["tags"] == [other[place] for place in range(len(text.split()))]
    else:
        assert all(isinstance(row["response"], str) for row in found)


@pytest.mark.parametrize(("model", "dataset"), [("encoder", "sequence"), ("decoder", "prompt")])
@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3", "pfeiffer"])
def test_results_on_adapters_load(finished, tmp_path, model, dataset, adapter):
    pytest.importorskip("peft", reason="adapters need the extra 'peft'")
    result = finished(model, dataset, adapter=adapter, budget=20)
    task = result.metrics["task"]
    expected = outputs(result.model, task)
    loaded, _ = sparse_optim.load_model(result.output)
    assert torch.equal(outputs(loaded, task), expected)
    target = tmp_path / "applied"
    command = ["apply", str(read_spec(load_delta(result.output / "delta.safetensors")).base)]
    shown = CliRunner().invoke(app, [*command, str(result.output), str(target)])
    if adapter == "pfeiffer":
        assert shown.exit_code == 1
        assert "no class of transformers has pfeiffer adapters" in shown.output
        return
    assert shown.exit_code == 0, shown.output
    merged = auto_class(task).from_pretrained(target)
    torch.testing.assert_close(outputs(merged, task), expected, rtol=0, atol=1e-5)
    from peft import AutoPeftModel

    again = AutoPeftModel.from_pretrained(result.output / "adapter")
    torch.testing.assert_close(outputs(again, task), expected, rtol=0, atol=1e-6)


def test_a_mean_pooled_result_is_never_taken_for_the_standard_class(finished, folders, tmp_path):
    """In a process that does not import sparse_optim, every plain way to load it is an error."""
    pytest.importorskip("peft", reason="adapters need the extra 'peft'")
    whole = finished("pooled", "sequence").output / "model"
    adapter = finished("pooled", "sequence", adapter="lora", budget=20).output / "adapter"
    code = f"""
import peft, transformers
ways = [
    lambda: transformers.AutoModelForSequenceClassification.from_pretrained({str(whole)!r}),
    lambda: transformers.pipeline("text-classification", {str(whole)!r}),
    lambda: transformers.AutoModelForSequenceClassification.from_pretrained({str(adapter)!r}),
    lambda: peft.AutoPeftModel.from_pretrained({str(adapter)!r}),
    lambda: peft.AutoPeftModelForSequenceClassification.from_pretrained({str(adapter)!r}),
]
for way in ways:
    try:
        way()
    except ValueError as error:
        assert "trust_remote_code=True" in str(error) or "import_allowlist" in str(error), error
    else:
        raise SystemExit("loaded")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    standard = transformers.AutoModelForSequenceClassification.from_pretrained(folders["pooled"])
    delta = load_delta(finished("pooled", "sequence").output / "delta.safetensors")
    with pytest.raises(ValueError, match="mean_classifier"):
        sparse_optim.apply_delta(standard, delta)


def test_cards_tell_how_to_load(finished):
    result = finished("encoder", "sequence")
    card = (result.output / "README.md").read_text()
    assert f"sparse_optim.load_model({str(result.output)!r})" in card
    assert "pipeline_tag: text-classification" in card
    assert "`many`, `none`" in card
    whole = (result.output / "model" / "README.md").read_text()
    namespace = {}
    exec(whole.split("```python\n")[1].split("```")[0], namespace)
    assert namespace["model"]("a b")[0]["label"] in ("many", "none")
    lora = finished("encoder", "sequence", adapter="lora", budget=20)
    card = (lora.output / "adapter" / "README.md").read_text()
    namespace = {}
    exec(card.split("```python\n")[1].split("```")[0], namespace)
    torch.testing.assert_close(
        outputs(namespace["model"], ""), outputs(lora.model, ""), rtol=0, atol=1e-6
    )


def test_the_note_of_a_delta_is_read_or_refused(finished, tmp_path):
    delta = load_delta(finished("encoder", "sequence").output / "delta.safetensors")
    spec = read_spec(delta)
    assert (spec.task, spec.labels, spec.max_length) == (
        "sequence-classification",
        ("many", "none"),
        16,
    )
    assert spec.columns.text == "text"
    for change, message in (
        ({"model": None}, "does not say how its model is built"),
        ({"model": {"task": "regression"}}, "lacks base or task"),
        ({"model": {**delta.method["model"], "colour": "red"}}, "unknown entry 'colour'"),
        ({"model": {**delta.method["model"], "max_length": "long"}}, "expected a whole number"),
        ({"model": {**delta.method["model"], "columns": {"colour": "red"}}}, "damaged"),
        ({"model": {**delta.method["model"], "task": "chess"}}, "unknown task"),
    ):
        method = {**delta.method, **change}
        method = {name: value for name, value in method.items() if value is not None}
        path = tmp_path / "delta.safetensors"
        save_delta(replace(delta, method=method), path)
        with pytest.raises(FinetuneError, match=message):
            sparse_optim.load_model(path)


def test_a_base_that_moved_is_named_or_given(finished, folders, tmp_path):
    result = finished("encoder", "sequence")
    delta = load_delta(result.output / "delta.safetensors")
    moved = {**delta.method, "model": {**delta.method["model"], "base": str(tmp_path / "gone")}}
    path = tmp_path / "delta.safetensors"
    save_delta(replace(delta, method=moved), path)
    with pytest.raises(FinetuneError, match=r"no such file or folder: .*gone"):
        sparse_optim.load_model(path)
    loaded, _ = sparse_optim.load_model(path, base=folders["encoder"])
    assert torch.equal(outputs(loaded, ""), outputs(result.model, ""))
    with pytest.raises(FinetuneError, match=r"has no delta\.safetensors"):
        sparse_optim.load_model(tmp_path / "..")
    with pytest.raises(FinetuneError, match="no such folder or file"):
        sparse_optim.load_model(tmp_path / "nothing")


def test_texts_are_read_from_files(finished, tmp_path):
    spec = load_tuned(finished("encoder", "sequence").output).spec
    (tmp_path / "a.txt").write_text("a b\nc d\n")
    assert read_texts(str(tmp_path / "a.txt"), spec)["text"] == ["a b", "c d"]
    (tmp_path / "b.csv").write_text("Review,stars\na b,3\n")
    assert read_texts(str(tmp_path / "b.csv"), spec)["text"] == ["a b"]
    (tmp_path / "c.csv").write_text("x,y\na b,3\n")
    with pytest.raises(FinetuneError, match=r"no column of texts recognised .*'text'"):
        read_texts(str(tmp_path / "c.csv"), spec)
    with pytest.raises(FinetuneError, match="single texts"):
        as_examples(["a"], ["b"], spec)
    pairs = replace(spec, columns=replace(spec.columns, text_pair="second"))
    with pytest.raises(FinetuneError, match="pairs of texts"):
        as_examples(["a"], None, pairs)


def test_evaluation_refuses_classes_that_the_model_does_not_have(finished, tmp_path):
    tuned = load_tuned(finished("encoder", "sequence").output)
    (tmp_path / "data.csv").write_text("text,label\na b,many\nc d,few\n")
    with pytest.raises(FinetuneError, match="no class 'few'; it has many, none"):
        evaluate(tuned, str(tmp_path / "data.csv"))
    (tmp_path / "data.csv").write_text("text,label\na b,many\n")
    assert evaluate(tuned, str(tmp_path / "data.csv"))["examples"] == 1


def test_the_commands(finished, folders, tmp_path):
    output = str(finished("encoder", "sequence").output)

    def invoke(*command):
        done = CliRunner().invoke(app, list(command))
        assert done.exit_code == 0, done.output
        return done.stdout

    label, score, text = invoke("predict", output, "a b c").rstrip("\n").split("\t")
    assert label in ("many", "none")
    assert text == "a b c"
    row = json.loads(invoke("predict", output, "a b c", "--json"))
    assert (row["label"], f"{row['score']:.4f}") == (label, score)
    target = tmp_path / "out.csv"
    invoke("predict", output, folders["sequence"], "-o", str(target))
    assert target.read_text().splitlines()[0] == "text,label,score"
    assert len(target.read_text().splitlines()) == 65
    found = json.loads(invoke("evaluate", output, folders["sequence"], "--json"))
    assert (found["examples"], found["split"]) == (64, "train")
    tags = str(finished("encoder", "token").output)
    assert invoke("predict", tags, "a b").count("/") == 2


@pytest.mark.slow
def test_the_built_in_encoder_predicts_after_every_route(tmp_path):
    pytest.importorskip("datasets")
    job = FinetuneConfig(
        "minilm", "trec6", tmp_path / "out", steps=12, max_length=24, budget=0.01, cpu=True,
        max_train_examples=200, max_eval_examples=64, save_model=True, verify=False,
    )  # fmt: skip
    result = run(job)
    reported = result.metrics["metric"]["value"]
    tuned = load_tuned(result.output)
    assert evaluate_first(tuned, 64) == pytest.approx(reported)
    pipe = pipeline("text-classification", str(result.output / "model"), trust_remote_code=True)
    from sparse_optim.finetune.data import DataRequest, load_data

    data = load_data(DataRequest("trec6", max_eval_examples=64)).evaluation
    names = tuned.spec.labels
    right = [
        row["label"] == names[label]
        for row, label in zip(pipe(list(data["text"])), data["label"], strict=True)
    ]
    assert sum(right) / 64 == pytest.approx(reported)


def evaluate_first(tuned, count):
    from sparse_optim.finetune.data import DataRequest, load_data

    data = load_data(DataRequest("trec6", max_eval_examples=count)).evaluation
    found = predict(tuned, as_examples(list(data["text"]), None, tuned.spec))
    names = tuned.spec.labels
    return sum(
        row["label"] == names[label] for row, label in zip(found, data["label"], strict=True)
    ) / len(data)


@pytest.mark.parametrize("adapter", ["lora", None])
def test_another_base_is_refused_where_the_delta_has_no_fingerprint_of_it(
    finished, folders, tmp_path, adapter
):
    settings = (
        {"adapter": "lora", "budget": 20} if adapter else {"method": "bitfit", "budget": None}
    )
    result = finished("encoder", "sequence", **settings)
    other = transformers.BertModel.from_pretrained(folders["encoder"])
    with torch.no_grad():
        other.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folders["encoder"]).save_pretrained(tmp_path / "other")
    with pytest.raises(FinetuneError, match="not the base model that was fine-tuned"):
        sparse_optim.load_model(result.output, base=str(tmp_path / "other"))


def test_loading_leaves_random_numbers_as_they_are(finished):
    output = finished("encoder", "sequence").output
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    sparse_optim.load_model(output)
    assert torch.equal(torch.rand(2), expected)


def test_an_adapter_does_not_depend_on_where_the_base_comes_from(folders):
    """A base from memory draws no random numbers, one from a file does."""
    from sparse_optim.finetune.build import build
    from sparse_optim.finetune.models import find_model, load_base_model, load_tokenizer
    from sparse_optim.finetune.spec import ModelSpec

    source = find_model(folders["decoder"])
    tokenizer = load_tokenizer(source)
    spec = ModelSpec(folders["decoder"], "causal-lm", adapter="lora", adapter_rank=2)

    def drawing(*arguments):
        torch.rand(5)
        return load_base_model(*arguments)

    one, other = (build(source, spec, tokenizer, load) for load in (load_base_model, drawing))
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


def test_tags_belong_to_their_words(finished):
    """Words without a token (and sentences of such words alone) shift nothing."""
    from datasets import Dataset
    from tokenizers import normalizers

    tuned = load_tuned(finished("encoder", "token").output)
    plain = predict(tuned, Dataset.from_dict({"text": [["a", "b", "c"]]}))[0]["tags"]

    sentences = [["a", "\u200b", "b", "c"], ["\u200b"], ["a", "b", "c"]]
    tuned.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    found = predict(tuned, Dataset.from_dict({"text": sentences}))
    assert [row["tags"] for row in found] == [[plain[0], None, *plain[1:]], [None], plain]
    assert [row["words"] for row in found] == sentences


def test_evaluation_reads_what_the_model_was_trained_on(finished, folders, tmp_path):
    tuned = load_tuned(finished("encoder", "sequence").output)
    assert evaluate(tuned, folders["sequence"])["trained_on"] is True
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,label\na b,c,many\nc d,e,none\n")
    with pytest.raises(FinetuneError, match=r"read as pairs of texts, .* trained on single texts"):
        evaluate(tuned, str(tmp_path / "pairs.csv"))
    (tmp_path / "chats.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 2}) + "\n"
    )
    prompts = load_tuned(finished("decoder", "prompt").output)
    with pytest.raises(FinetuneError, match="trained on texts or prompts"):
        evaluate(prompts, str(tmp_path / "chats.jsonl"))


def test_unlabelled_examples_are_refused(finished, tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["many", "none"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features)
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "data")
    tuned = load_tuned(finished("encoder", "sequence").output)
    with pytest.raises(FinetuneError, match="label -1"):
        evaluate(tuned, str(tmp_path / "data"))


def test_files_of_texts_are_checked(finished, tmp_path):
    spec = load_tuned(finished("encoder", "sequence").output).spec
    (tmp_path / "a.CSV").write_text("TEXT\na b\n")
    assert read_texts(str(tmp_path / "a.CSV"), spec)["text"] == ["a b"]
    (tmp_path / "lines.txt").write_text("a\u2028b\x0cc\nd\n", encoding="utf-8")
    assert len(read_texts(str(tmp_path / "lines.txt"), spec)) == 2
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(FinetuneError, match="no texts"):
        read_texts(str(tmp_path / "empty.txt"), spec)
    (tmp_path / "missing.csv").write_text("text,n\na,1\n,2\n")
    with pytest.raises(FinetuneError, match="has no value in 1 of 2 rows"):
        read_texts(str(tmp_path / "missing.csv"), spec)
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(FinetuneError, match="expected text"):
        read_texts(str(tmp_path / "numbers.jsonl"), spec)


def test_instructions_need_no_context_to_predict(finished, tmp_path):
    tuned = load_tuned(finished("decoder", "prompt").output)
    columns = replace(tuned.spec.columns, text="instruction", text_pair="input", label="output")
    tuned = replace(tuned, spec=replace(tuned.spec, columns=columns))
    (tmp_path / "bare.jsonl").write_text('{"instruction": "a b"}\n')
    (tmp_path / "prompts.jsonl").write_text('{"Prompt": "a b", "context": "c"}\n')
    assert read_texts(str(tmp_path / "bare.jsonl"), tuned.spec).column_names == ["text"]
    both = read_texts(str(tmp_path / "prompts.jsonl"), tuned.spec)
    assert (both["text"], both["text_pair"]) == (["a b"], ["c"])
    assert predict(tuned, both) == predict(tuned, as_examples(["a b"], ["c"], tuned.spec))


def test_accumulation_does_not_multiply_the_loss(folders, tmp_path):
    """The Trainer would not divide the sum by the number of micro batches."""
    losses = []
    for name, settings in (
        ("one", {"batch_size": 8}),
        ("two", {"batch_size": 4, "accumulation": 2}),
    ):
        job = config(folders, tmp_path / name, "encoder", "sequence", log_every=1, steps=1)
        result = run(replace(job, method="full", **settings))
        losses.append(result.metrics["log"][0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.2)
