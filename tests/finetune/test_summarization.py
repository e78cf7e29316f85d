"""Summarization: encoder-decoders read texts with limits, write, and are measured by ROUGE."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="the main job needs the extra 'finetune'")
pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from datasets import Dataset
from tiny_models import save_bart, save_decoder, save_encoder, save_t5
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, EvalPrediction
from typer.testing import CliRunner

from sparse_optim.cli.main import app
from sparse_optim.delta import load_delta, save_delta
from sparse_optim.finetune import FinetuneConfig, FinetuneError
from sparse_optim.finetune.columns import Columns
from sparse_optim.finetune.data import load_data
from sparse_optim.finetune.encode import Lengths, Targets, encode_summaries
from sparse_optim.finetune.inputs import load_base, load_inputs
from sparse_optim.finetune.job import run
from sparse_optim.finetune.metrics import ROUGE, summary_metrics
from sparse_optim.finetune.models import check_lengths, check_writes, find_model
from sparse_optim.finetune.predict import as_examples, evaluate, predict, read_texts
from sparse_optim.finetune.prepare import describe_scripts
from sparse_optim.finetune.request import data_request
from sparse_optim.finetune.reuse import load_tuned
from sparse_optim.finetune.seq2seq import declared_prefix, longest_source, set_decoding
from sparse_optim.finetune.values import check_values

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # peft asks transformers for a name that transformers deprecates.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family, and eight texts with their first words as summaries."""
    root = tmp_path_factory.mktemp("summaries")
    draw = random.Random(0)
    texts = [" ".join(draw.choices("abcdefgh", k=6)) for _ in range(8)]
    rows = [{"document": text, "summary": " ".join(text.split()[:3])} for text in texts]
    for split in ("train", "validation"):
        path = root / "pairs" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"t5": save_t5(root / "t5"), "bart": save_bart(root / "bart")}
    return {name: str(path) for name, path in (*models.items(), ("pairs", root / "pairs"))}


def job(folders, output, model, **settings):
    defaults = {"steps": 60, "eval_every": 20, "batch_size": 8, "lr": 2e-2, "cpu": True}
    arguments = {**defaults, "budget": 0.5, "rank": "all", "unmask_share": 0.5}
    arguments |= {"max_target_length": 8, **settings}
    return FinetuneConfig(folders[model], folders["pairs"], output, **arguments)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A job that learns the eight pairs by heart; BART with beams, and the best model is kept."""
    kept = {}

    def get(model):
        if model not in kept:
            output = tmp_path_factory.mktemp("runs") / "out"
            more = {"num_beams": 2, "best": True, "metric": "rouge2"} if model == "bart" else {}
            kept[model] = run(job(folders, output, model, save_model=True, **more))
        return kept[model]

    return get


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_a_model_learns_pairs_and_every_way_to_load_it_writes_the_same(
    finished, folders, tmp_path, model
):
    result = finished(model)
    metrics, log = result.metrics, result.metrics["log"]
    rouge = [row["rouge1"] for row in metrics["evaluations"]]
    assert log[-1]["loss"] < log[0]["loss"] / 10
    assert rouge[-1] > 0.95
    assert rouge[-1] > rouge[0]
    assert metrics["verified"] is True  # bit for bit, tied embeddings included
    assert metrics["metric"]["name"] == ("rouge2" if model == "bart" else "rouge1")

    tuned = load_tuned(result.output)
    assert (
        evaluate(tuned, folders["pairs"]).items()
        >= {name: metrics["final"][name] for name in (*ROUGE, "loss")}.items()
    )
    texts = read_texts(folders["pairs"], tuned.spec)["text"]
    written = [row["summary"] for row in predict(tuned, as_examples(texts, None, tuned.spec))]
    in_parts = predict(tuned, as_examples(texts, None, tuned.spec), batch_size=3)
    assert [row["summary"] for row in in_parts] == written
    wanted = [" ".join(text.split()[:3]) for text in texts]
    scores = summary_metrics(EvalPrediction(written, wanted), [])
    assert scores == {name: metrics["final"][name] for name in ROUGE}

    card = (result.output / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("A text", texts[0])
    names = {}
    exec(code, names)
    assert names["tokenizer"].decode(names["ids"], skip_special_tokens=True) == written[0]
    assert "pipeline_tag: summarization" in card
    assert ("| prefix | summarize:  |" in card) == (model == "t5")
    assert f"| beams | {2 if model == 'bart' else 1} |" in card

    applied = tmp_path / "applied"
    done = CliRunner().invoke(app, ["apply", folders[model], str(result.output), str(applied)])
    assert done.exit_code == 0, done.output
    again = AutoModelForSeq2SeqLM.from_pretrained(applied)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    tensors, found = result.model.state_dict(), again.state_dict()
    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)


def test_the_commands(finished, folders, tmp_path):
    output = str(finished("t5").output)

    def invoke(*command):
        done = CliRunner().invoke(app, list(command))
        assert done.exit_code == 0, done.output
        return done.stdout

    tuned = load_tuned(output)
    expected = [row["summary"] for row in predict(tuned, read_texts(folders["pairs"], tuned.spec))]
    rows = f"{folders['pairs']}/train.jsonl"
    assert invoke("predict", output, rows).splitlines() == expected
    shown = json.loads(invoke("evaluate", output, folders["pairs"], "--json"))
    assert shown["rouge1"] == finished("t5").metrics["metric"]["value"]
    assert (shown["cut"], shown["targets_cut"], shown["dropped"]) == (0, 0, 0)
    asked = ("--sequence", "16", "--optimizer", "sparse", "--json")
    (row,) = json.loads(invoke("estimate", "-m", folders["t5"], *asked))["rows"]
    parameters = finished("t5").metrics["model"]["parameters"]
    assert row["weights"] == 2 * parameters  # bfloat16, with the tied output layer that writes
    assert "rouge1 on" in invoke("compare", output, "-o", str(tmp_path / "picture.png"))


# What torch says when peft multiplies by a sparse tensor.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_a_delta_is_exported_to_peft_unless_it_changes_tied_embeddings(finished, tmp_path):
    pytest.importorskip("peft", reason="adapters need the extra 'peft'")
    output = finished("t5").output
    command = ["export-peft", "--whole", "-o", str(tmp_path / "shira")]
    done = CliRunner().invoke(app, [*command, str(output)])
    assert "are tied, and a peft adapter would change only one of them" in done.output
    delta = load_delta(output / "delta.safetensors")
    kept = [name for name in delta.sparse if name != "shared.weight"]
    assert len(kept) == len(delta.sparse) - 1
    parts = ({name: table[name] for name in kept} for table in (delta.sparse, delta.fingerprints))
    sparse, fingerprints = parts
    part = replace(delta, sparse=sparse, fingerprints=fingerprints, tied={})
    save_delta(part, tmp_path / "delta.safetensors")
    done = CliRunner().invoke(app, [*command, str(tmp_path / "delta.safetensors")])
    assert done.exit_code == 0, done.output
    names = {}
    exec(done.output.split("load it so: ")[1].strip(), names)
    expected = load_tuned(tmp_path / "delta.safetensors").model
    ids = torch.tensor([[4, 5, 6, 1]])
    with torch.no_grad():
        found = names["model"].eval()(input_ids=ids, decoder_input_ids=ids).logits
        wanted = expected(input_ids=ids, decoder_input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_lora_on_an_encoder_decoder(folders, tmp_path):
    pytest.importorskip("peft", reason="adapters need the extra 'peft'")
    settings = {"steps": 2, "adapter": "lora", "adapter_rank": 2, "budget": 100}
    result = run(job(folders, tmp_path / "out", "bart", **settings))
    assert result.metrics["verified"] is True
    adapted = {name.split(".")[-4] for name in result.model.state_dict() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    found = evaluate(load_tuned(result.output), folders["pairs"])
    assert found["loss"] == result.metrics["final"]["loss"]


def test_what_is_cut_is_counted_and_said(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders["t5"])
    split = {"text": ["a b c d", "a", ""], "label": ["a b c", "a b", ""]}
    targets = Targets(3, "summarize: ")
    encoded = encode_summaries(Dataset.from_dict(split), tokenizer, 4, targets)
    assert (encoded.cut, encoded.targets_cut, encoded.dropped) == (1, 1, 0)
    texts = [tokenizer.decode(ids) for ids in encoded.examples["input_ids"]]
    assert texts == ["summarize: a b </s>", "summarize: a </s>", "summarize: </s>"]
    summaries = [tokenizer.decode(ids) for ids in encoded.examples["labels"]]
    assert summaries == ["a b </s>", "a b </s>", "</s>"]
    assert encoded.describe("train", Lengths(4, targets)) == [
        "train: 3 of 3 examples; 1 cut to --max-length 4, 1 cut to --max-target-length 3"
    ]


def test_without_an_end_token_of_the_tokenizer_an_empty_text_or_summary_is_kept(folders, tmp_path):
    """`predict` has no summaries: it encodes an empty one for each text."""
    tokenizer = AutoTokenizer.from_pretrained(folders["t5"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    split = {"text": ["a b", ""], "label": ["", "c"]}
    encoded = encode_summaries(Dataset.from_dict(split), tokenizer, 4, Targets(3))
    assert encoded.dropped == 0
    assert [tokenizer.decode(ids) for ids in encoded.examples["input_ids"]] == ["a b", "</s>"]
    assert [tokenizer.decode(ids) for ids in encoded.examples["labels"]] == ["</s>", "c"]


def test_summaries_that_rouge_cannot_read_are_said(folders, tmp_path):
    rows = [{"document": "a", "summary": text} for text in ("Привет", "a b", "", "Ada 1", "再见")]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    places = {**folders, "pairs": str(tmp_path / "train.jsonl")}
    config = job(places, tmp_path / "out", "bart", eval_fraction=0.5, source_prefix="")
    data = load_data(data_request(config))
    (note,) = describe_scripts(
        replace(
            data,
            evaluation=Dataset.from_list(rows).rename_columns(
                {"document": "text", "summary": "label"}
            ),
        )
    )
    assert "2 of 4 summaries have none: their values are 0" in note
    assert summary_metrics(EvalPrediction(["再见"], ["再见"]), [])["rouge1"] == 0
    assert describe_scripts(load_data(data_request(job(folders, tmp_path / "out", "bart")))) == []
    assert any("ROUGE reads" in note for note in load_inputs(config).notes)


def test_what_a_model_writes_may_be_a_list_as_text():
    split = Dataset.from_dict({"text": ["a b", "c"], "label": ["['a', 'b']", "['c']"]})
    check_values(split, "train", Columns("source", None, "target"), "summarization")
    swapped = split.rename_columns({"text": "label", "label": "text"})
    with pytest.raises(FinetuneError, match="'source' holds lists that are written as text"):
        check_values(swapped, "train", Columns("source", None, "target"), "summarization")


def test_limits_and_prefix_are_those_of_the_model_or_given(folders, tmp_path):
    inputs = load_inputs(job(folders, tmp_path / "out", "t5", max_target_length=None))
    assert inputs.lengths == Lengths(1024, Targets(128, "summarize: ", 1))
    assert inputs.notes == (
        "each text begins with 'summarize: ', as the model's config.json says (see "
        "--source-prefix)",
    )
    plain = load_inputs(job(folders, tmp_path / "out", "t5", source_prefix="", num_beams=3))
    assert (plain.lengths, plain.notes) == (Lengths(1024, Targets(8, "", 3)), ())
    config = load_base(job(folders, tmp_path / "out", "bart"), plain).model.config
    tokenizer = plain.tokenizer
    assert declared_prefix(config) == "summarize: "
    tokenizer.model_max_length = 512
    assert longest_source(config, tokenizer, 1024) == 512
    config.max_position_embeddings = 32
    assert longest_source(config, tokenizer, 1024) == 32


def test_lengths_and_beams_are_the_jobs_and_other_generation_settings_the_models(folders):
    model = AutoModelForSeq2SeqLM.from_pretrained(folders["bart"])
    own = model.generation_config
    for beams, penalty in ((1, None), (4, 2.0)):
        model.generation_config = own
        set_decoding(model, Targets(8, "", beams))
        found = model.generation_config
        assert (found.max_length, found.min_length, found.num_beams) == (9, None, beams)
        assert (found.length_penalty, found.no_repeat_ngram_size) == (penalty, 3)
    assert own.num_beams == 4
    own.decoder_start_token_id = None
    model.generation_config = own
    with pytest.raises(FinetuneError, match="decoder_start_token_id: add it"):
        set_decoding(model, Targets(8))
    check_lengths(model, 32, Targets(32))
    with pytest.raises(FinetuneError, match="positions for 32: use --max-target-length 32"):
        check_lengths(model, 32, Targets(33))
    with pytest.raises(FinetuneError, match=r"has 33 tokens.* use --max-length 32"):
        check_lengths(model, 33, Targets(8))


def test_models_and_settings_of_other_tasks_are_named(folders, tmp_path):
    sources = {"t5": find_model(folders["t5"])}
    for name, save in (("decoder", save_decoder), ("encoder", save_encoder)):
        sources[name] = find_model(str(save(tmp_path / name)))
    check_writes(sources["t5"], "summarization")
    check_writes(sources["decoder"], "causal-lm")
    for name, task, message in (
        ("t5", "causal-lm", r"\(t5\) is an encoder-decoder: use --task summarization"),
        ("decoder", "summarization", "is not an encoder-decoder.* or --task causal-lm$"),
        ("encoder", "summarization", "use one such as facebook/bart-base or google-t5/t5-base$"),
    ):
        with pytest.raises(FinetuneError, match=message):
            check_writes(sources[name], task)
    places = {**folders, "decoder": sources["decoder"].location}
    for setting in ({"num_beams": 2}, {"source_prefix": ""}, {"max_target_length": 4}):
        given = {"max_target_length": None, **setting}
        option = next(iter(setting)).replace("_", "-")
        with pytest.raises(FinetuneError, match=f"--{option} is for summarization, .* causal-lm"):
            load_inputs(job(places, tmp_path / "out", "decoder", task="causal-lm", **given))
