"""A series of models from one run: when a member is kept, its bits, and how it is used.

Fault planted by hand: only the last part kept.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

from finetune_jobs import config, make_folders, write_checkpoint
from transformers import TrainerControl, TrainerState, TrainingArguments
from typer.testing import CliRunner

from sparse_optim.cli.main import app
from sparse_optim.delta import Delta, DeltaError, SparseValues, increment, load_delta
from sparse_optim.delta._packing import packed_bytes
from sparse_optim.finetune import FinetuneError
from sparse_optim.finetune.checkpoints import check_checkpoint
from sparse_optim.finetune.job import run, same_bits
from sparse_optim.finetune.reuse import find_delta, load_model
from sparse_optim.finetune.series import note_of, read_series
from sparse_optim.finetune.series_recorder import SeriesRecorder, without_steps
from sparse_optim.finetune.summary import describe_series

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["025.safetensors", "050.safetensors", "075.safetensors", "100.safetensors"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


def test_a_series_of_one_run_its_files_and_a_resumed_run(folders, tmp_path, monkeypatch):
    seen: dict[int, dict[str, torch.Tensor]] = {}
    plain = SeriesRecorder.on_evaluate

    def record(self, args, state, control, metrics=None, model=None, **more):
        seen[state.global_step] = {k: v.clone() for k, v in model.state_dict().items()}
        plain(self, args, state, control, metrics)

    monkeypatch.setattr(SeriesRecorder, "on_evaluate", record)
    # 400 entries in the first 8 of 10 steps: the parts end with steps 2, 4, 6 and 8.
    job = {"series": 4, "every": 1, "unmask_share": 0.8, "budget": 400, "steps": 10, "lr": 1e-2}
    job |= {"eval_every": 5, "save_every": 5, "best": True}
    whole = run(config(folders, tmp_path / "out", "encoder", "sequence", **job))
    series = tmp_path / "out" / "series"
    assert sorted(path.name for path in series.iterdir()) == NAMES
    rows = whole.metrics["series"]
    assert rows == json.loads((tmp_path / "out" / "metrics.json").read_text())["series"]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["entries"] for row in rows] == [100, 200, 300, 400]
    assert [row["share"] for row in rows] == [0.25, 0.5, 0.75, 1.0]
    evaluated = {row["step"]: row for row in whole.metrics["evaluations"]}
    assert sorted(evaluated) == [2, 4, 5, 6, 8, 10]
    before = None
    for name, row in zip(NAMES, rows, strict=True):
        assert row["file"] == f"series/{name}"
        assert row["value"] == evaluated[row["step"]][row["metric"]]
        assert row["bytes"] == (series / name).stat().st_size
        model, _ = load_model(series / name)
        for key, tensor in model.state_dict().items():
            assert same_bits(tensor, seen[row["step"]][key]), (name, key)
        delta = load_delta(series / name)
        # Without a parent's positions and steps to save, an increment is no smaller.
        assert before is None or increment(delta, before).nbytes >= delta.nbytes
        for key, values in before.sparse.items() if before else ():
            assert torch.isin(values.position, delta.sparse[key].position).all()
        before = delta
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| series/050.safetensors | 50% | 200 | 4 | {rows[1]['value']:.4g} |" in card

    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-5"
    saved = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {"series-1.safetensors", "series-2.safetensors"} <= saved.keys()
    assert "series-3.safetensors" not in saved
    seen.clear()
    rest = run(config(folders, tmp_path / "rest", "encoder", "sequence", resume=checkpoint, **job))
    assert min(seen) == 6  # no member is made again
    assert rest.metrics["series"] == rows
    for name in NAMES:
        assert (tmp_path / "rest" / "series" / name).read_bytes() == (series / name).read_bytes()

    shown = CliRunner().invoke(app, ["inspect", str(series)])
    assert "075.safetensors" in shown.output
    assert "300" in shown.output
    shown = CliRunner().invoke(app, ["inspect", "--json", str(series)])
    assert json.loads(shown.output) == {"members": rows}
    with pytest.raises(FinetuneError, match=r"several models: .* 025.safetensors, 050"):
        find_delta(series)


@pytest.mark.parametrize("changed", [{"metric": "f1"}, {"max_eval_examples": 3}])
def test_a_resumed_run_measures_its_members_as_before(folders, tmp_path, changed):
    """Half of the members would have the values of another metric, under one heading."""
    job = config(folders, tmp_path / "out", "encoder", "sequence", series=4)
    checkpoint = write_checkpoint(tmp_path / "checkpoint-2", job)
    check_checkpoint(checkpoint, replace(job, eval_every=3))
    with pytest.raises(FinetuneError, match="it is of another job: --m"):
        check_checkpoint(checkpoint, replace(job, **changed))
    plain = replace(job, series=None)
    without = write_checkpoint(tmp_path / "checkpoint-3", plain)
    check_checkpoint(without, replace(plain, **changed))


def test_patience_does_not_count_the_evaluations_of_a_series(folders, tmp_path):
    """They come when entries are unmasked: training would stop earlier than without a series."""
    job = {"series": 8, "every": 1, "steps": 8, "eval_every": 4, "patience": 2, "best": True}
    job |= {"lr": 1e-9, "head_lr": 1e-12, "verify": False}  # no evaluation is better
    metrics = run(config(folders, tmp_path / "out", "encoder", "sequence", **job)).metrics
    assert len(metrics["evaluations"]) > 3
    assert (metrics["steps"], metrics["stopped_early"]) == (8, False)


class Recorded:
    """A recorder whose optimizer has unmasked so many of 8 entries at each step."""

    def __init__(self, parts: int, unmasked: list[int]) -> None:
        self.now, self.unmasked = 0, unmasked
        steps = torch.arange(3, dtype=torch.int32)
        values = SparseValues((8,), torch.float32, torch.arange(3), torch.ones(3), steps)
        delta = Delta({"w": values}, fingerprints={"w": "0" * 32}, method={"step": 1})
        self.recorder = SeriesRecorder(parts, "f1", lambda: (self.now, 8), lambda: delta)

    def train(self) -> list[int]:
        """Take the steps; return those that were evaluated."""
        found = []
        for step, unmasked in enumerate(self.unmasked, 1):
            self.now = unmasked
            control, state = TrainerControl(), TrainerState(global_step=step)
            self.recorder.on_step_end(None, state, control)
            if control.should_evaluate:
                found.append(step)
                self.recorder.on_evaluate(None, state, control, {"eval_f1": step / 10})
        return found


@pytest.mark.parametrize(
    ("parts", "unmasked", "steps", "kept"),
    [
        (4, [1, 2, 3, 4, 5, 6, 7, 8, 8], [2, 4, 6, 8], [1, 2, 3, 4]),
        (4, [5, 5, 8], [1, 3], [2, 4]),  # a step that reaches two parts has one member
        (2, [3, 3, 3], [], []),  # stopped early
        (3, [2, 3, 5, 6, 8], [2, 4, 5], [1, 2, 3]),  # at least 8/3, 16/3 and 8
    ],
)
def test_when_a_member_is_kept(parts, unmasked, steps, kept):
    case = Recorded(parts, unmasked)
    assert case.train() == steps
    assert sorted(case.recorder.members) == kept
    notes = [note_of(case.recorder.members[part]) for part in kept]
    assert [note["step"] for note in notes] == steps
    assert [note["value"] for note in notes] == [step / 10 for step in steps]


def test_a_member_has_no_unmask_steps_and_survives_its_checkpoint(tmp_path):
    case = Recorded(2, [4, 8])
    case.train()
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    (tmp_path / "checkpoint-2").mkdir()
    case.recorder.on_save(arguments, TrainerState(global_step=2), TrainerControl())
    again = Recorded(2, [8])
    again.recorder.restore(tmp_path / "checkpoint-2")
    assert again.train() == []
    for part, delta in case.recorder.members.items():
        assert delta.sparse["w"].unmask_step is None
        assert again.recorder.members[part].method == delta.method
    numel = delta.sparse["w"].numel
    assert without_steps(delta).nbytes == 3 * 4 + packed_bytes(3, numel)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pafi"}, "--series is for the method id3: with pafi no set of entries grows"),
        ({"series": 0}, "--series must be above 0"),
        ({"series": 101}, "--series must be 0 to 100"),
    ],
)
def test_what_has_no_series(folders, tmp_path, settings, message):
    with pytest.raises(FinetuneError, match=message):
        config(folders, tmp_path, "encoder", "sequence", **{"series": 4, **settings})


def test_a_folder_of_other_files_is_no_series(tmp_path):
    assert read_series(tmp_path) == []
    (tmp_path / "025.safetensors").write_bytes(b"no delta at all")
    with pytest.raises(DeltaError, match=r"025.safetensors"):
        read_series(tmp_path)
    with pytest.raises(FinetuneError, match="not a member of a series"):
        note_of(Delta({}))
    note = {"part": 3, "parts": 2, "step": 1, "metric": "f1", "value": 0.5}
    with pytest.raises(FinetuneError, match="its note is damaged"):
        note_of(Delta({}, method={"series": note}))


def test_a_member_on_the_hub(monkeypatch):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return "somewhere"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    find_delta("ada/reviews/series/050.safetensors")
    find_delta("ada/reviews")
    assert asked == [
        ("ada/reviews", "series/050.safetensors"),
        ("ada/reviews", "delta.safetensors"),
    ]
    with pytest.raises(FinetuneError, match="no such folder or file"):
        find_delta("ada/reviews/other/050.safetensors")


def test_its_line_in_the_summary():
    rows = [
        {"share": 0.5, "value": 0.61, "step": 3},
        {"share": 1.0, "value": 0.7, "step": 1500},
    ]
    found = "0.6100 at 50% (step 3), 0.7000 at 100% (step 1,500)"
    assert describe_series(rows, 2) == found
    missing = "2 of 4 parts: see --every, --unmask-share and --steps"
    assert describe_series(rows, 4) == f"{found}; {missing}"
    assert describe_series([], 4).startswith("0 of 4 parts")
