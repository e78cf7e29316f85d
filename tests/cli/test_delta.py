"""Model folders and the commands `inspect`, `apply`, `diff`."""

import json
import re
from dataclasses import replace

import pytest
import torch
from cli_runs import invoker
from delta_cases import assert_identical, clone, example_base, example_delta
from safetensors.torch import load_file, save_file

from sparse_optim.cli.delta import register
from sparse_optim.delta import (
    Delta,
    DeltaError,
    compose,
    content_fingerprint,
    folder_tensors,
    increment,
    load_delta,
    merge,
    merge_folder,
    save_delta,
)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return invoker(register)


def write_folder(folder, tensors, shards=1):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "pytorch_model.bin").write_bytes(b"the base again")
    (folder / "nested").mkdir()
    (folder / "nested" / "tokenizer.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = [f"model-{at + 1:05}-of-{shards:05}.safetensors" for at in range(shards)]
    for at, file in enumerate(files):
        save_file({name: tensors[name] for name in names[at::shards]}, folder / file)
    index = {"weight_map": {name: files[at % shards] for at, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_delta(path, delta):
    save_delta(delta, path)
    return path


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_apply_writes_the_merged_folder(tmp_path, run, shards):
    base = example_base()
    delta = example_delta(base)
    base_folder = write_folder(tmp_path / "base", base, shards)
    out = tmp_path / "deep" / "out"
    text = run("apply", base_folder, write_delta(tmp_path / "delta", delta), out)
    assert "18 entries and 1 dense tensors merged" in text
    assert "added head.weight" in text
    expected = merge(delta, base)
    found = folder_tensors(out)
    assert_identical({name: found[name] for name in expected}, expected)
    assert_identical(folder_tensors(base_folder), folder_tensors(base_folder) | clone(base))
    assert (out / "config.json").read_text() == '{"model_type": "test"}'
    assert (out / "nested" / "tokenizer.json").exists()
    assert not (out / "pytorch_model.bin").exists()
    assert not (out / "checkpoint-5").exists()
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def renamed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("shards", [1, 2])
def test_head_on_a_bare_encoder_takes_the_models_names(tmp_path, shards):
    base = example_base()
    delta = example_delta(renamed(base, "bert."))
    folder = write_folder(tmp_path / "base", base, shards)
    merged = merge_folder(folder, delta, tmp_path / "out")
    assert (merged.prefix, merged.added) == ("bert.", ("head.weight",))
    expected = merge(delta, renamed(base, "bert."))
    found = folder_tensors(tmp_path / "out")
    assert_identical({name: found[name] for name in expected}, expected)
    assert len(found) == len(expected)


def headless(delta, **dense):
    return Delta(sparse=delta.sparse, dense=dense, fingerprints=delta.fingerprints)


def test_without_a_new_head_the_names_stay_the_bases(tmp_path):
    base = example_base() | {"pooler.bias": torch.zeros(3)}
    tuned = renamed(example_base(), "bert.")
    delta = headless(example_delta(tuned), **{"bert.pooler.bias": torch.ones(3)})
    folder = write_folder(tmp_path / "base", base)
    merged = merge_folder(folder, delta, tmp_path / "out")
    assert (merged.prefix, merged.added) == ("bert.", ())
    expected = merge(headless(example_delta(example_base())), example_base())
    expected["pooler.bias"] = torch.ones(3)
    found = folder_tensors(tmp_path / "out")
    assert_identical({name: found[name] for name in expected}, expected)


def test_delta_of_a_bare_encoder_fits_a_model_with_a_prefix(tmp_path):
    base = renamed(example_base(), "bert.") | {"cls.bias": torch.zeros(2)}
    delta = example_delta(example_base())
    merged = merge_folder(write_folder(tmp_path / "base", base), delta, tmp_path / "out")
    assert (merged.prefix, merged.added) == ("bert.", ("bert.head.weight",))
    plain = merge(delta, example_base())
    expected = renamed(plain, "bert.") | {"cls.bias": base["cls.bias"]}
    found = folder_tensors(tmp_path / "out")
    assert_identical({name: found[name] for name in expected}, expected)


def test_names_that_fit_in_several_ways_or_none_are_refused(tmp_path):
    base = example_base()
    twice = renamed(base, "bert.") | renamed(clone(base), "other.")
    with pytest.raises(DeltaError, match=r"3 of the delta's 3.*'a.weight'.*in several ways"):
        merge_folder(write_folder(tmp_path / "b", twice), example_delta(base), tmp_path / "out")
    with pytest.raises(DeltaError, match="even with a prefix"):
        merge_folder(tmp_path / "b", example_delta({"z": base["c.bias"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refused_merge_leaves_nothing(tmp_path, run):
    base = example_base()
    folder = write_folder(tmp_path / "base", base, shards=3)
    other = example_delta(base | {"c.bias": base["c.bias"] + 1})  # In the last shard.
    path = write_delta(tmp_path / "delta", other)
    before = sorted(tmp_path.rglob("*"))
    error = run("apply", folder, path, tmp_path / "out", code=1)
    assert "not the base of this delta" in error
    assert "'c.bias'" in error
    assert sorted(tmp_path.rglob("*")) == before


def test_apply_errors_are_one_line(tmp_path, run):
    base = example_base()
    folder = write_folder(tmp_path / "base", base)
    delta = write_delta(tmp_path / "delta", example_delta(base))
    out = tmp_path / "out"
    assert "no such folder or file" in run("apply", folder, tmp_path / "none", out, code=1)
    assert "no such file or folder" in run("apply", tmp_path / "none", delta, out, code=1)
    assert "new or empty folder" in run("apply", folder, delta, folder, code=1)
    (tmp_path / "empty").mkdir()
    assert "no model.safetensors" in run("apply", tmp_path / "empty", delta, out, code=1)
    step = increment(example_delta(base, seed=4), example_delta(base))
    error = run("apply", folder, write_delta(tmp_path / "step", step), out, code=1)
    assert "compose it with its parent" in error
    (folder / "model.safetensors").write_bytes(b"cut")
    assert "cut or damaged" in run("apply", folder, delta, out, code=1)
    assert not out.exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "expected a JSON object"),
        ("{", "expected a JSON object"),
        ('{"weight_map": {}}', "names of files in this folder"),
        ('{"weight_map": {"x": "../model.safetensors"}}', "names of files in this folder"),
        ('{"weight_map": {"x": "model-9.safetensors"}}', "model-9.safetensors is missing"),
    ],
)
def test_bad_indexes(tmp_path, index, message):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DeltaError, match=message):
        folder_tensors(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    base = example_base()
    folder = write_folder(tmp_path / "base", base, shards=3)
    save_file(base, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(DeltaError, match=r"is in model-0000.* and in model-0000"):
        merge_folder(folder, example_delta(base), tmp_path / "out")


def test_inspect_shows_what_is_there(tmp_path, run):
    delta = example_delta(example_base(torch.bfloat16))
    text = run("inspect", write_delta(tmp_path / "delta", delta))
    for shown in (
        "id3",
        "budget",
        "18 (15.6522% of 115)",
        str(delta.nbytes),
        content_fingerprint(delta),
    ):
        assert shown in text
    (row,) = (line for line in text.splitlines() if "b.weight" in line)
    for cell in ("5x4x3", "bfloat16", " 6 ", "10.0000%", f" {delta.sparse['b.weight'].nbytes} "):
        assert cell in row
    (row,) = (line for line in text.splitlines() if "head.weight" in line)
    assert "2x4" in row
    steps = torch.cat([values.unmask_step for values in delta.sparse.values()])
    assert f"{int(steps.min())} to {int(steps.max())}" in text
    step = increment(example_delta(example_base(), seed=4), delta)
    text = run("inspect", write_delta(tmp_path / "step", step))
    assert content_fingerprint(delta) in text
    (tmp_path / "junk").write_bytes(b"junk[red]" * 9)
    assert "not a delta" in run("inspect", tmp_path / "junk", code=1)


def test_markup_in_names_is_shown_as_it_is(tmp_path, run):
    delta = Delta(sparse={}, dense={"[red]x[/red]": torch.ones(1)}, method={"name": "[bold]"})
    text = run("inspect", write_delta(tmp_path / "delta", delta))
    assert "[red]x[/red]" in text
    assert "[bold]" in text


def test_diff_of_two_folders_makes_a_delta(tmp_path, run):
    base = example_base()
    tuned = merge(example_delta(base), base)
    folders = [
        write_folder(tmp_path / "base", base, 2),
        write_folder(tmp_path / "tuned", tuned, 3),
    ]
    text = run("diff", *folders, "--out", tmp_path / "delta")
    assert str((tmp_path / "delta").stat().st_size) in text.replace(",", "")
    delta = load_delta(tmp_path / "delta")
    merged = merge(delta, base)
    assert_identical({name: merged[name] for name in tuned}, tuned)
    assert all(values.original is None for values in delta.sparse.values())
    run("diff", *folders, "--out", tmp_path / "delta", "--originals")
    originals = load_delta(tmp_path / "delta").sparse
    assert all(values.original is not None for values in originals.values())
    run("apply", folders[0], tmp_path / "delta", tmp_path / "again")
    found = folder_tensors(tmp_path / "again")
    assert_identical({name: found[name] for name in tuned}, tuned)


def test_diff_of_two_deltas_shows_the_overlap(tmp_path, run):
    delta = example_delta(example_base())
    part = delta.prefix(6)
    paths = [write_delta(tmp_path / "a", delta), write_delta(tmp_path / "b", part)]
    rows = {
        line.split("│")[1].strip(): line.split("│")[2].strip()
        for line in run("diff", *paths).splitlines()
        if line.startswith("│")
    }
    assert rows["entries in both"] == "6"
    assert rows["entries in A"] == "18 (33.33% in both)"
    assert rows["entries in B"] == "6 (100.00% in both)"
    assert rows["in both by chance"].endswith("times that)")
    assert rows["Jaccard"] == "0.3333"
    assert rows["in both, equal bits"] == "6"
    assert rows["dense in both"] == "1"
    assert rows["same base"] == "yes"


def layered_deltas(tmp_path, originals=True):
    """A base in a folder, and two deltas over it: in layers of a stack, and outside them."""
    generator = torch.Generator().manual_seed(0)
    parts = ("self_attention.query", "fc")
    names = [f"transformer.h.{at}.{part}.weight" for at in range(3) for part in parts]
    base = {name: torch.randn(20, 50, generator=generator) for name in [*names, "norm.weight"]}
    paths = []
    for number in (1, 2):
        tuned = clone(base)
        for at, (name, tensor) in enumerate(tuned.items()):
            if name != "transformer.h.1.fc.weight":  # nothing changes there
                tensor.view(-1)[: 10 * at + 5 * number] *= 1 + 0.5 * number
        delta = Delta.from_models(base, tuned, store_original=originals)
        paths.append(write_delta(tmp_path / f"delta{number}", delta))
    return write_folder(tmp_path / "base", base), *paths


@pytest.mark.parametrize("width", [80, 120])
def test_inspect_maps_layers_and_modules(tmp_path, run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, path, _ = layered_deltas(tmp_path)
    lines = [line.rstrip() for line in run("inspect", path).splitlines()]
    assert all(len(line) <= width for line in lines)
    at = lines.index("transformer.h: entries changed, %")
    assert [line.split() for line in lines[at + 1 : at + 6]] == [
        ["layer", "query", "fc", "all"],
        ["0", "0.50", "1.5", "1.0"],
        ["1", "2.5", "·", "2.5"],
        ["2", "4.5", "5.5", "5.0"],
        ["all", "2.5", "3.5", "2.9"],
    ]
    at = lines.index("outside the layers: entries changed, %")
    assert lines[at + 1].split() == ["norm.weight", "65", "of", "1,000", "6.5"]


def test_inspect_maps_sizes_and_draws(tmp_path, run):
    base, path, _ = layered_deltas(tmp_path, originals=False)
    assert "stores no originals" in run("inspect", path, "--size", code=1)
    text = run("inspect", path, "--size", "--base", base, "--plot", tmp_path / "map.png")
    assert "transformer.h: size of the change, % of the base's values" in text
    assert re.search(r"^ +0 +50 +50 +50$", text, re.MULTILINE)  # each value became 1.5 times it
    assert f"{tmp_path / 'map.png'}: the picture" in text
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    changes = json.loads(run("inspect", path, "--size", "--base", base, "--json"))["changes"]
    assert changes["norm.weight"] == {
        "entries": 65, "numel": 1000, "share": 0.065, "relative": pytest.approx(0.5),
    }  # fmt: skip
    assert "changes" not in json.loads(run("inspect", path, "--json"))
    assert "ends in .png" in run("inspect", path, "--plot", tmp_path / "map.txt", code=1)


def test_inspect_of_a_model_without_layers_has_no_map(tmp_path, run):
    path = write_delta(tmp_path / "delta", example_delta(example_base()))
    assert "entries changed, %" not in run("inspect", path)
    assert re.search(r"b\.weight +6 of 60", run("inspect", path, "--size"))


@pytest.mark.parametrize("width", [80, 120])
def test_diff_by_module(tmp_path, run, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    base, *paths = layered_deltas(tmp_path, originals=False)
    text = run("diff", *paths)
    assert "Signs and cosines need the base's values: give --base" in text
    assert "cosine" not in text.split("Signs")[0]
    text = run("diff", *paths, "--base", base)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    split = [line.split() for line in text.splitlines() if line.strip()]
    rows = {first: cells for first, *cells in split}
    name = "transformer.h.*.self_attention.query" if width == 120 else "query"
    assert rows[name][:3] == ["75", "90", "75"]
    assert rows["norm"] == ["65", "70", "65", "4.5", "0.929", "100.0%", *rows["norm"][6:]]
    facts = json.loads(run("diff", *paths, "--base", base, "--json"))
    query = facts["modules"]["transformer.h.*.self_attention.query"]
    assert (query["both"], query["share_a"], query["opposite"]) == (75, 1.0, 0)
    assert query["cosine_both"] == pytest.approx(1)
    assert 0.9 < query["cosine"] < 1
    assert query["expected"] == pytest.approx((5 * 10 + 25 * 30 + 45 * 50) / 1000)
    assert facts["total"]["both"] == facts["both"]
    every = json.loads(run("diff", *paths, "--json", "--all"))["modules"]
    assert every["transformer.h.2.fc.weight"]["both"] == 55
    assert every["transformer.h.2.fc.weight"]["cosine"] is None
    assert "two deltas" in run("diff", base, base, "--all", code=1)


def test_diff_errors(tmp_path, run):
    delta = write_delta(tmp_path / "delta", example_delta(example_base()))
    folder = write_folder(tmp_path / "base", example_base())
    assert "one of each" in run("diff", folder, delta, code=1)
    assert "two model folders" in run("diff", delta, delta, "--out", tmp_path / "x", code=1)
    half = write_folder(tmp_path / "half", example_base(torch.float16))
    assert "cast one of them" in run("diff", folder, half, code=1)
    error = run("diff", folder, folder, "--out", tmp_path / "absent" / "x", code=1)
    assert "No such file" in error


def test_diff_of_unrelated_deltas_says_so(tmp_path, run):
    base = example_base()
    delta = example_delta(base)
    paths = [write_delta(tmp_path / "delta", delta)]

    def diff_with(other):
        return run("diff", paths[0], write_delta(tmp_path / "other", other), code=1)

    # The heads have one name and shape, and the models nothing else.
    renamed_delta = example_delta(renamed(base, "other."))
    assert "no parameter of the same name and shape in common" in diff_with(renamed_delta)
    elsewhere = example_delta({name: tensor + 1 for name, tensor in base.items()})
    assert "different bases. None of the 3 parameters in both had" in diff_with(elsewhere)
    partly = example_delta(base | {"c.bias": base["c.bias"] + 1})
    related = run("diff", paths[0], write_delta(tmp_path / "partly", partly))
    assert "no, where they overlap" in related
    whole = Delta(sparse={}, dense={"a.weight": base["a.weight"]})
    assert "entries in both" in run("diff", paths[0], write_delta(tmp_path / "whole", whole))


def test_diff_of_unrelated_models_says_so(tmp_path, run):
    base = example_base()
    folder = write_folder(tmp_path / "base", base)
    other = write_folder(tmp_path / "other", renamed(base, "other."))
    out = tmp_path / "delta"
    assert "A and B are unrelated models" in run("diff", folder, other, "--out", out, code=1)
    assert not out.exists()
    partly = {name: base[name] for name in ("a.weight", "b.weight")} | {"x": torch.ones(2)}
    text = run("diff", folder, write_folder(tmp_path / "partly", partly))
    assert "1 tensors only in A are not in the delta" in text
    assert "1 tensors of B, new or of another shape, are stored whole" in text


def test_json_is_all_that_stdout_has(tmp_path, run):
    base = example_base()
    delta = replace(example_delta(base), method={"name": "id3", "lr": float("nan")})
    path = write_delta(tmp_path / "delta", delta)
    shown = json.loads(run("inspect", path, "--json"))
    assert shown["method"] == {"name": "id3", "lr": None}
    assert (shown["sparse_entries"], shown["sparse_numel"], shown["originals"]) == (18, 115, True)
    assert shown["fingerprint"] == content_fingerprint(delta)
    assert shown["sparse"][1] == {
        "name": "b.weight", "shape": [5, 4, 3], "dtype": "bfloat16", "entries": 6,
        "bytes": delta.sparse["b.weight"].nbytes,
    }  # fmt: skip
    assert [each["name"] for each in shown["dense"]] == ["head.weight"]
    both = json.loads(run("diff", path, write_delta(tmp_path / "b", delta.prefix(6)), "--json"))
    assert (both["both"], both["only_a"], both["only_b"], both["same_base"]) == (6, 12, 0, True)
    tuned = merge(delta, base)
    folders = [write_folder(tmp_path / "base", base), write_folder(tmp_path / "tuned", tuned)]
    made = json.loads(run("diff", *folders, "--out", tmp_path / "made", "--json"))
    assert made == json.loads(run("inspect", tmp_path / "made", "--json"))


def test_a_folder_of_finetune_stands_for_its_delta(tmp_path, run):
    pytest.importorskip("transformers", reason="transformers is not installed")
    delta = example_delta(example_base())
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_delta(tmp_path / name / "delta.safetensors", delta)
    assert content_fingerprint(delta) in run("inspect", tmp_path / "a")
    assert "in both, equal bits" in run("diff", tmp_path / "a", tmp_path / "b")


def test_a_folder_takes_a_composed_delta(tmp_path):
    base = example_base()
    parent, delta = example_delta(base, seed=3), example_delta(base)
    whole = compose(parent, increment(delta, parent))
    merge_folder(write_folder(tmp_path / "base", base), whole, tmp_path / "out")
    expected = merge(delta, base)
    found = folder_tensors(tmp_path / "out")
    assert_identical({name: found[name] for name in expected}, expected)


@pytest.mark.slow
def test_transformers_loads_the_merged_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    task = transformers.BertForSequenceClassification
    tuned = task.from_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in tuned.bert.state_dict().items()}
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.view(-1)[::5] += 0.25
    delta = Delta.from_models(renamed(before, "bert."), tuned)
    assert delta.sparse
    merged = merge_folder(tmp_path / "base", delta, tmp_path / "out")
    assert set(merged.added) == {"classifier.weight", "classifier.bias"}
    assert_identical(
        dict(task.from_pretrained(tmp_path / "out").state_dict()), dict(tuned.state_dict())
    )


def test_control_characters_of_a_file_are_shown_as_escapes(tmp_path, run):
    delta = example_delta(example_base())
    delta = replace(delta, method={"name": "\x1b[2J", "\u202eturned": "\ud800"})
    text = run("inspect", write_delta(tmp_path / "delta", delta))
    for shown in (r"\x1b[2J", r"\u202eturned", r"\ud800"):
        assert shown in text
    assert all(c.isprintable() for c in text.replace("\n", ""))
    message = run("inspect", tmp_path / "\x1b[31mabsent", code=1)
    assert r"\x1b[31mabsent: no such file" in message


def test_inspect_shows_ten_tensors_and_folds_names_at_dots(tmp_path, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    names = [f"encoder.layer.{i}.attention.output.dense.weight" for i in range(12)]
    base = {name: torch.zeros(40, 1000) for name in names}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    for count, tensor in enumerate(tuned.values(), 1):
        tensor[0, :count] = 1
    dense = {f"head.{i}": torch.zeros(1 + i) for i in range(11)}
    note = {"name": "id3", "model": {"columns": {"text": "review"}, "chat": False}}
    delta = replace(Delta.from_models(base, tuned), method=note, dense=dense)
    text = run("inspect", write_delta(tmp_path / "delta", delta))
    assert re.findall(r"encoder\.layer\.(\d+)", text) == [str(i) for i in range(11, 1, -1)]
    assert "2 more: --all\n" in re.sub(" +\n", "\n", text)
    assert re.findall(r"head\.(\d+)", text) == [str(i) for i in range(10, 0, -1)]
    assert "1 more: --all" in text
    assert "model columns" in text
    assert "text: review" in text
    assert "{" not in text
    folded = [line.split()[1] for line in text.splitlines() if "output" in line]
    assert folded == ["output.dense.weight"] * 10  # below "encoder.layer.11.attention."
    text = run("inspect", tmp_path / "delta", "--all")
    assert len(re.findall(r"encoder\.layer\.", text)) == 12
    assert "more" not in text
