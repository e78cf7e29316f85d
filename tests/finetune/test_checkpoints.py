"""Checkpoints resume the same run or are refused; signals save one; killed jobs block nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the job needs the extra 'finetune'")

import yaml
from finetune_jobs import config, make_folders, write_checkpoint
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sparse_optim.cli.main import app
from sparse_optim.finetune import FinetuneConfig, FinetuneError, job, output
from sparse_optim.finetune import checkpoints as module
from sparse_optim.finetune.checkpoints import find_last
from sparse_optim.finetune.job import run
from sparse_optim.finetune.stopping import JobStoppedError
from sparse_optim.finetune.trainer import JobTrainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return make_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory) -> Path:
    """The output of a job with checkpoints at steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    run(config(folders, folder, "encoder", "sequence", save_every=2))
    return folder


@pytest.fixture
def checkpoints(saved, tmp_path) -> Path:
    """A copy of its checkpoints."""
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def resume(folders, checkpoint: Path, output: Path, **settings) -> None:
    run(config(folders, output, "encoder", "sequence", resume=checkpoint, **settings))


FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, flip], ids=["missing", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_checkpoint_names_the_next_older_one(
    folders, checkpoints, tmp_path, name, damage
):
    """It went on with a fresh optimizer, or to another result, and exited with 0."""
    damage(checkpoints / "checkpoint-4" / name)
    expected = rf"checkpoint-4: .*; resume from {checkpoints.resolve()}/checkpoint-2"
    with pytest.raises(FinetuneError, match=expected) as caught:
        resume(folders, checkpoints / "checkpoint-4", tmp_path / "out")
    assert name in str(caught.value) or name == "trainer_state.json"
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_damaged_records_are_no_tracebacks(folders, checkpoints, tmp_path):
    manifest = checkpoints / "checkpoint-4" / "manifest.json"
    record = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**record, "config": []}))
    with pytest.raises(FinetuneError, match=r"manifest\.json is not what was saved"):
        resume(folders, checkpoints / "checkpoint-4", tmp_path / "out")
    (tmp_path / "metrics.json").write_text('{"files": 5}')
    assert output.earlier_results(tmp_path) == set()


def test_another_base_of_the_same_name_is_refused(folders, checkpoints, tmp_path):
    other = tmp_path / Path(folders["encoder"]).name
    shutil.copytree(folders["encoder"], other)
    tensors = load_file(other / "model.safetensors")
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 1}, other / "model.safetensors", {"format": "pt"})
    given = {**folders, "encoder": str(other)}
    with pytest.raises(FinetuneError, match="was trained with another base model"):
        resume(given, checkpoints / "checkpoint-4", tmp_path / "out")


def test_a_checkpoint_whose_saving_was_cut_short(folders, checkpoints, tmp_path):
    (checkpoints / "checkpoint-4" / "manifest.json").unlink()
    (checkpoints / "checkpoint-2" / "manifest.json").write_text("{")
    with pytest.raises(FinetuneError, match="saving was cut short; no older checkpoint fits"):
        resume(folders, checkpoints / "checkpoint-4", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "pafi"}, "--method was 'id3', now it is 'pafi'"),
        ({"dtype": "bfloat16"}, "--dtype was 'float32', now it is 'bfloat16'"),
        ({"steps": 9}, "--steps was 6, now it is 9"),
        ({"lr": 3e-3}, "--lr was 0.001, now it is 0.003"),
        ({"seed": 5}, "--seed was 0, now it is 5"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused(folders, checkpoints, tmp_path, settings, message):
    with pytest.raises(FinetuneError, match=f"it is of another job: {message}"):
        resume(folders, checkpoints / "checkpoint-4", tmp_path / "out", **settings)


def test_settings_that_change_nothing_may_differ(folders, checkpoints, tmp_path):
    settings = {"verify": False, "eval_every": 5, "save_every": 5, "threads": 1}
    resume(folders, checkpoints / "checkpoint-2", tmp_path / "out", **settings)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [row["step"] for row in metrics["evaluations"]] == [1, 2, 5, 6]
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-5").exists()
    assert (tmp_path / "out" / "delta.safetensors").exists()


def test_a_finished_run_takes_no_more_steps_when_it_is_resumed(folders, tmp_path):
    """Its last checkpoint is within an epoch: the Trainer took a step 6 of 5."""
    job = {"steps": 5, "save_every": 5}
    run(config(folders, tmp_path / "one", "encoder", "sequence", **job))
    last = tmp_path / "one" / "checkpoints" / "checkpoint-5"
    resume(folders, last, tmp_path / "two", **job)
    metrics, deltas = zip(
        *(
            (json.loads((folder / "metrics.json").read_text()), (folder / "delta.safetensors"))
            for folder in (tmp_path / "one", tmp_path / "two")
        ),
        strict=True,
    )
    assert metrics[0]["steps"] == metrics[1]["steps"] == 5
    assert metrics[0]["evaluations"] == metrics[1]["evaluations"]
    assert deltas[0].read_bytes() == deltas[1].read_bytes()
    assert not list((tmp_path / "two").glob("checkpoints/checkpoint-*"))


def test_other_training_examples_are_refused(folders, checkpoints, tmp_path):
    lines = Path(folders["sequence"]).read_text().splitlines()
    first = json.loads(lines[0])
    changed = tmp_path / Path(folders["sequence"]).name
    rows = [json.dumps({**first, "text": "h h h"}), *lines[1:]]
    changed.write_text("\n".join(rows))
    given = {**folders, "sequence": str(changed)}
    with pytest.raises(FinetuneError, match="was trained with another set of training examples"):
        resume(given, checkpoints / "checkpoint-4", tmp_path / "out")


def test_a_setting_that_an_earlier_version_lacked_had_its_default(folders, checkpoints, tmp_path):
    manifest = checkpoints / "checkpoint-4" / "manifest.json"
    record = json.loads(manifest.read_text())
    kept = {
        name: record["config"][name] for name in record["config"] if name not in ("amp", "dense")
    }
    manifest.write_text(json.dumps({**record, "config": kept}))
    job = config(folders, tmp_path, "encoder", "sequence", save_every=2)
    assert find_last(checkpoints, job) == checkpoints / "checkpoint-6"
    assert module.find_problem(checkpoints / "checkpoint-4", job) is None
    other = config(folders, tmp_path, "encoder", "sequence", save_every=2, dense=("bert.pooler",))
    assert "--dense was []" in module.find_problem(checkpoints / "checkpoint-4", other)


@pytest.mark.parametrize(
    ("saved", "settings", "problem"),
    [
        ({"every": "-"}, {"every": 1}, None),
        ({"every": "-"}, {}, "--every was 1, now it is None"),
        ({"every": 16}, {"method": "pafi"}, None),
        ({"rank": "-"}, {}, None),
        ({"rank": "-"}, {"rank": "linear"}, "--rank was 'all', now it is 'linear'"),
        ({"every": "-"}, {"method": "pafi"}, None),  # it has no such setting
        ({"max_length": 128}, {"max_length": None}, None),
        ({"max_length": None}, {"max_length": 1024}, None),  # the task may be causal-lm
        ({"max_length": 128}, {"max_length": None, "task": "regression"}, None),
        (
            {"max_length": 128},
            {"max_length": None, "task": "causal-lm"},
            "--max-length was 128, now it is 1024",
        ),
        ({"max_length": 64}, {"max_length": None}, "--max-length was 64, now it is None"),
        ({"max_length": 128}, {"max_length": 1024}, "--max-length was 128, now it is 1024"),
        (
            {"max_length": 128},
            {"max_length": None, "best": True},
            "--max-length was 128, now it is None",
        ),
        ({"lr": None, "adam_eps": None}, {"lr": 1e-3}, None),
        ({"lr": None}, {"lr": 1e-4}, "--lr was 0.001, now it is 0.0001"),
        ({"lr": 1e-3}, {}, None),
        ({"budget": None}, {"budget": 0.01}, None),
    ],
)
def test_what_a_manifest_left_to_defaults_is_compared_by_value(
    folders, tmp_path, saved, settings, problem
):
    job = config(folders, tmp_path / "out", "encoder", "sequence", **settings)
    folder = write_checkpoint(tmp_path / "checkpoint-2", job)
    record = json.loads((folder / "manifest.json").read_text())
    record["config"] |= saved
    kept = {name: value for name, value in record["config"].items() if value != "-"}
    (folder / "manifest.json").write_text(json.dumps({**record, "config": kept}))
    found = module.find_problem(folder, job)
    assert found == (None if problem is None else f"it is of another job: {problem}")


def test_last_is_the_newest_whole_checkpoint(folders, checkpoints, tmp_path):
    job = config(folders, tmp_path, "encoder", "sequence", save_every=2)
    assert find_last(checkpoints, job) == checkpoints / "checkpoint-6"
    (checkpoints / "checkpoint-6" / "manifest.json").unlink()
    assert find_last(checkpoints, job) == checkpoints / "checkpoint-4"
    other = config(folders, tmp_path, "encoder", "sequence", seed=5)
    with pytest.raises(FinetuneError, match=r"--resume last: .*checkpoint-6: it is incomplete"):
        find_last(checkpoints, other)
    with pytest.raises(FinetuneError, match=r"last: no checkpoint in .*out/checkpoints: begin"):
        resume(folders, Path("last"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_oldest_checkpoints_go_once_the_newest_is_whole(folders, tmp_path, monkeypatch):
    """The Trainer removed them before: a job killed in between had no whole one."""
    rotate, saved = module.rotate_checkpoints, []

    def watch(folder: str, limit: int | None, **options: bool) -> None:
        newest = max(Path(folder).glob("checkpoint-*"), key=lambda path: path.name)
        assert (newest / "manifest.json").exists()
        saved.append(newest.name)
        rotate(folder, limit, **options)

    monkeypatch.setattr(module, "rotate_checkpoints", watch)
    job = {"save_every": 2, "save_total_limit": 1}
    run(config(folders, tmp_path / "one", "encoder", "sequence", **job))
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    (left,) = (tmp_path / "one" / "checkpoints").iterdir()
    assert left.name == "checkpoint-6"
    resume(folders, left, tmp_path / "two", **job)


# Signals.

JOB = """
import sys, time
from pathlib import Path
from transformers import TrainerCallback
from sparse_optim.cli.main import app
from sparse_optim.finetune import trainer

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        print("step", state.global_step, flush=True)
        time.sleep(0.2)

plain = trainer.JobTrainer.__init__
def slow(self, *args, **kwargs):
    plain(self, *args, **kwargs)
    self.add_callback(Slow())
trainer.JobTrainer.__init__ = slow
app(sys.argv[1:])
"""


def start(folders, output: Path, *options: str) -> subprocess.Popen[str]:
    settings = ["--steps", "12", "--batch-size", "8", "--max-length", "16", "--budget", "500"]
    command = [
        "finetune", "-m", folders["encoder"], "-d", folders["sequence"], "-o", str(output),
        "--cpu", "--eval-fraction", "0.25", "--threads", "1", "--rank", "all", *settings, *options,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", JOB, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == f"step {step}":
            return
    raise AssertionError(process.stderr.read() if process.stderr else "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_a_checkpoint_that_ends_as_the_unbroken_run(folders, tmp_path, number, code):
    process = start(folders, tmp_path / "run")
    wait_for(process, 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Stopping after this step, with a checkpoint" in out
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    told = f"with a checkpoint in {checkpoint}. The same command with --resume last goes on"
    assert told in " ".join(err.split())
    assert not (tmp_path / "run" / "delta.safetensors").exists()
    with pytest.raises(FinetuneError, match=f"--resume last goes on from {checkpoint}"):
        run(config(folders, tmp_path / "run", "encoder", "sequence", steps=12))
    resume(folders, Path("last"), tmp_path / "run", steps=12)
    run(config(folders, tmp_path / "whole", "encoder", "sequence", steps=12))
    ours, theirs = (load_file(tmp_path / name / "delta.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_same_command_runs_after_a_kill_before_the_first_checkpoint(folders, tmp_path):
    """An empty checkpoints/, a lock and temporary files blocked it."""
    process = start(folders, tmp_path / "run", "--save-every", "10")
    wait_for(process, 2)
    process.kill()
    process.communicate()
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    assert (tmp_path / "run" / ".lock").exists()
    run(config(folders, tmp_path / "run", "encoder", "sequence"))
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def test_two_jobs_do_not_write_to_one_folder(folders, tmp_path):
    process = start(folders, tmp_path / "run")
    try:
        wait_for(process, 1)
        with pytest.raises(FinetuneError, match="another job is writing to"):
            run(config(folders, tmp_path / "run", "encoder", "sequence", overwrite=True))
    finally:
        process.terminate()
        process.communicate(timeout=60)


# Results.


def test_an_output_that_cannot_be_written_is_said_before_training(folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FinetuneError, match=r"cannot be written \(Not a directory"):
        run(config(folders, tmp_path / "file" / "out", "encoder", "sequence"))

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(job, "load_inputs", lambda config: pytest.fail("it began to load"))
    monkeypatch.setattr(output.os, "fsync", full)
    with pytest.raises(FinetuneError, match=r"cannot be written \(No space left on device"):
        run(config(folders, tmp_path / "out", "encoder", "sequence"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [OSError, RuntimeError, SafetensorError])
def test_results_that_cannot_be_written_are_written_elsewhere(folders, tmp_path, monkeypatch, kind):
    """A disk that fills up during training; each library has an error of its own for it."""
    monkeypatch.setattr(job.tempfile, "gettempdir", lambda: str(tmp_path))
    real = job.save_delta

    def full(delta, path: Path, **options: bool) -> None:
        if path.is_relative_to(tmp_path / "out"):
            raise kind("No space left on device")
        real(delta, path, **options)

    monkeypatch.setattr(job, "save_delta", full)
    with pytest.raises(FinetuneError, match=r"No space left.*the results are in .*sparse-optim-"):
        run(config(folders, tmp_path / "out", "encoder", "sequence"))
    (folder,) = tmp_path.glob("sparse-optim-*")
    assert json.loads((folder / "metrics.json").read_text())["verified"]
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_checked_stay(folders, tmp_path, monkeypatch):
    real, calls = job.load_base, []

    def gone(*args):
        calls.append(args)
        if len(calls) > 1:
            raise RuntimeError("the base is gone")
        return real(*args)

    monkeypatch.setattr(job, "load_base", gone)
    with pytest.raises(FinetuneError, match=r"the results are in .*out, but .* the base is gone"):
        run(config(folders, tmp_path / "out", "encoder", "sequence"))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["verified"] is None
    assert (tmp_path / "out" / "delta.safetensors").exists()


def test_a_picture_that_fails_loses_nothing(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "draw_curves", lambda *_: 1 / 0)
    metrics = run(config(folders, tmp_path / "out", "encoder", "sequence")).metrics
    assert "curves.png" not in metrics["files"]
    assert (tmp_path / "out" / "delta.safetensors").exists()


@pytest.mark.parametrize("at", range(1, 7))
def test_a_killed_exchange_of_results_is_undone(tmp_path, at):
    """The old results were moved away, and some of the new ones in their places."""
    folder = tmp_path / "out"
    folder.mkdir()
    names = ["delta.safetensors", "metrics.json"]
    (folder / "metrics.json").write_text(json.dumps({"files": names}))
    (folder / "delta.safetensors").write_text("old")
    for other in (".old-photos", ".new-ideas"):  # not ours
        (folder / other).mkdir()
        (folder / other / "delta.safetensors").write_text("mine")
    code = f"""
import os, sys
from pathlib import Path
from sparse_optim.finetune import output
real, calls = os.replace, []
def replace(source, target):
    calls.append(source)
    if len(calls) == {at}:
        os._exit(9)
    real(source, target)
os.replace = replace
with output.replaced_results(Path(sys.argv[1])) as new:
    for name in ("curves.png", "delta.safetensors", "metrics.json"):
        (new / name).write_text("new")
"""
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    assert killed.returncode == (9 if at <= 5 else 0)
    with output.locked(folder):
        expected = "old" if at <= 5 else "new"
        assert (folder / "delta.safetensors").read_text() == expected
        assert output.earlier_results(folder) == (set(names) if at <= 5 else set())
        assert (folder / "curves.png").exists() == (at > 5)
    left = {path.name for path in folder.iterdir()} - {"curves.png"}
    assert left == {*names, ".old-photos", ".new-ideas"}
    assert (folder / ".old-photos" / "delta.safetensors").read_text() == "mine"


def test_names_with_brackets_are_no_markup(folders, tmp_path):
    """The table of results was an error of rich after the training."""
    given = FinetuneConfig(**vars(config(folders, tmp_path / "run[/x]", "encoder", "sequence")))
    written = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(given).items()
        if value not in (None, ())
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(written))
    result = CliRunner().invoke(app, ["finetune", "--config", str(tmp_path / "job.yaml")])
    assert result.exit_code == 0, result.output
    assert "run[/x]" in "".join(result.output.split())


# What a signal or a repeated command finds.


def test_a_signal_in_an_evaluation_leaves_the_rest_of_it_out(folders, tmp_path, monkeypatch):
    seen = []
    predict = JobTrainer.prediction_step

    def counted(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if seen == [2]:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, *args, **kwargs)

    settings = {"steps": 6, "eval_every": 2, "eval_batch_size": 4}
    with monkeypatch.context() as patch:
        patch.setattr(JobTrainer, "prediction_step", counted)
        with pytest.raises(JobStoppedError) as stopped:
            run(config(folders, tmp_path / "run", "encoder", "sequence", **settings))
    assert stopped.value.exit_code == 143
    assert seen == [2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    resume(folders, Path("last"), tmp_path / "run", **settings)
    run(config(folders, tmp_path / "whole", "encoder", "sequence", **settings))
    ours, theirs = (load_file(tmp_path / name / "delta.safetensors") for name in ("run", "whole"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_finished_run_has_nothing_to_resume_and_keeps_its_results(folders, tmp_path):
    settings = {"save_every": 3}
    run(config(folders, tmp_path / "run", "encoder", "sequence", **settings))
    header = (tmp_path / "run" / "config.yaml").read_text().splitlines()[0]
    assert f"--config {tmp_path / 'run' / 'config.yaml'} " in header
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    with pytest.raises(FinetuneError, match=r"nothing is left to do: .* ended at step 6"):
        resume(folders, Path("last"), tmp_path / "run", **settings)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    resume(folders, Path("last"), tmp_path / "run", overwrite=True, **settings)
