"""The commands `merge` and `unmerge`."""

import json

import pytest
import torch
from cli_runs import invoker
from delta_cases import example_base, example_delta
from safetensors.torch import save_file

from sparse_optim.cli.delta import register as register_delta
from sparse_optim.cli.delta_merge import register
from sparse_optim.delta import (
    Delta,
    content_fingerprint,
    folder_tensors,
    load_delta,
    merge,
    merge_deltas,
    save_delta,
)


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return invoker(register, register_delta)


@pytest.fixture
def files(tmp_path):
    """A base folder and three delta files over it; the first has another head than the others."""
    base = example_base()
    (tmp_path / "base").mkdir()
    save_file(base, tmp_path / "base" / "model.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        delta = example_delta(base, entries=6, seed=seed)
        head = {"head.weight": torch.full((2, 4), float(seed > 0))}
        save_delta(Delta(delta.sparse, head, delta.fingerprints), path)
    return tmp_path / "base", *paths


def test_merge_writes_what_merge_deltas_gives(run, files, tmp_path):
    base, a, b, c = files
    out = tmp_path / "out.safetensors"
    options = ("--weights", "-1,0.5,2", "--method", "ties", "--density", 0.5, "--dense", b)
    text = run("merge", a, b, c, "--base", base, "-o", out, "--originals", *options)
    found = load_delta(out)
    expected = merge_deltas(
        [load_delta(path) for path in (a, b, c)],
        base,
        weights=[-1, 0.5, 2],
        method="ties",
        density=0.5,
        dense=1,
        store_original=True,
    )
    assert content_fingerprint(found) == content_fingerprint(expected)
    assert text.startswith(f"{out}: {found.num_entries} entries and 1 dense tensors, ")
    assert "merge" in run("inspect", out)
    run("apply", base, out, tmp_path / "model")
    model, merged = folder_tensors(tmp_path / "model"), merge(expected, example_base())
    assert all(torch.equal(model[name], tensor) for name, tensor in merged.items())


def test_dare_by_its_seed(run, files, tmp_path):
    _, a, b, c = files
    outs = [tmp_path / f"out{at}" for at in range(3)]
    for seed, out in zip((0, 1, 0), outs, strict=True):
        options = ("--method", "dare", "--density", 0.5, "--seed", seed, "--dense", a)
        run("merge", a, b, c, "-o", out, *options)
    prints = [content_fingerprint(load_delta(out)) for out in outs]
    assert prints[0] == prints[2] != prints[1]


def test_unmerge(run, files, tmp_path):
    base, a, b, c = files
    out, less = tmp_path / "out", tmp_path / "less"
    run("merge", a, b, c, "-o", out, "--weights", "1,2,3", "--dense", a)
    text = run("unmerge", out, a, c, b, "-o", less, "--base", base)
    assert text.startswith(f"{less}: ")
    run("merge", b, c, "-o", out, "--weights", "2,3")
    assert less.read_bytes() == out.read_bytes()


def test_the_report(run, files, tmp_path):
    _, a, b, c = files
    text = run("merge", a, b, c, "--report")
    assert f"A = {a}, B = {b}" in text
    assert text.count("all parameters") == 3
    assert "opposite" in text
    out = tmp_path / "out"
    parsed = json.loads(run("merge", b, c, "--report", "--json", "-o", out))
    assert (parsed["out"], parsed["bytes"]) == (str(out), out.stat().st_size)
    assert parsed["entries"] == load_delta(out).num_entries
    (pair,) = parsed["conflicts"]
    assert (pair["a"], pair["b"]) == (str(b), str(c))
    assert pair["total"]["entries_a"] == 18
    assert pair["total"]["both"] == sum(part["both"] for part in pair["parameters"].values()) > 0
    assert pair["total"]["overlap"] == pair["total"]["both"] / 18
    assert -1 <= pair["total"]["cosine"] <= 1
    assert json.loads(run("merge", b, c, "--json", "-o", out))["conflicts"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to do: give --out FILE, --report, or both"),
        (("-o", "{tmp}/x"), "a.safetensors and "),
        (("-o", "{tmp}/x", "--dense", "{tmp}/z"), "expected one of the deltas to merge"),
        (("-o", "{tmp}/x", "--weights", "1,a"), "--weights: expected numbers such as 1,0.5"),
        (("-o", "{tmp}/x", "--weights", "1"), "weights: expected 2"),
        (("-o", "{tmp}/x", "--method", "mean"), "method: expected one of sum, ties"),
        (("-o", "{tmp}/x", "--base", "{tmp}"), "no model.safetensors and no"),
        (("-o", "{tmp}/x", "--base", "{tmp}/c.safetensors"), "it is a file, name the folder"),
        (("-o", "{tmp}/base"), "it is a folder, name a file in it"),
        (("-o", "{tmp}/none/x"), "there is no folder {tmp}/none"),
        (("-o", "{tmp}/a.safetensors"), "it is one of the deltas, which would be lost"),
    ],
)
def test_errors_in_one_line(run, files, tmp_path, options, message):
    _, a, b, _ = files
    before = a.read_bytes()
    text = run("merge", a, b, *(option.format(tmp=tmp_path) for option in options), code=1)
    assert message.format(tmp=tmp_path) in text
    assert not (tmp_path / "x").exists()
    assert a.read_bytes() == before


def test_errors_of_unmerge_name_files(run, files, tmp_path):
    _, a, b, c = files
    out, less = tmp_path / "out", tmp_path / "less"
    run("merge", b, c, "-o", out)
    for arguments, message in (
        ((out, a, b), f"{a}: it is not an input of the merged delta"),
        ((out, b, a), f"{a}: it is not an input of the merged delta"),
        ((a, b, c), f"{a}: expected a delta that a merge made"),
    ):
        assert message in run("unmerge", *arguments, "-o", less, code=1)
    run("merge", a, b, c, "-o", out, "--dense", a)
    text = run("unmerge", out, b, c, "-o", less, code=1)
    assert "the other deltas: expected all other inputs of the merge, 2; missing is one of" in text
    text = run("unmerge", out, a, b, c, "-o", out, code=1)
    assert "it is one of the deltas, which would be lost" in text
    assert not less.exists()
