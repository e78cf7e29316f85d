"""Checkpoints that resume the same run, or are refused.

The Trainer writes a checkpoint file by file, and resumes from what it finds: without optimizer.pt
it begins with a fresh optimizer. So each whole checkpoint gets a manifest: hashes of its files, the
settings of the job, and hashes of the base and of the training examples.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from sparse_optim.files import replacing
from sparse_optim.finetune.builtin_data import DATASETS
from sparse_optim.finetune.config import AUTO, MAX_TARGET_LENGTH, FinetuneConfig, option
from sparse_optim.finetune.defaults import resolved
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.processes import wait_for_all
from sparse_optim.finetune.tasks import TASKS

MANIFEST = "manifest.json"
PIECE_BYTES = 1 << 24
# Settings that may differ from those of the interrupted run: they do not change what is trained.
FREE = frozenset(
    {
        *("output", "resume", "overwrite", "verify", "save_model", "report_to", "metric"),
        "store_steps",
        *("eval_every", "log_every", "save_every", "eval_batch_size", "eval_split"),
        *("max_eval_examples", "threads", "cpu", "backend", "gradient_checkpointing"),
        *("save_total_limit", "push_to_hub", "num_beams"),
    }
)
# But they decide which evaluation is the best.
JUDGES = frozenset({"metric", "eval_every", "eval_split", "max_eval_examples", "num_beams"})
SERIES_JUDGES = JUDGES - {"eval_every"}  # how the members of a series are measured
PLACES = ("model", "dataset")  # may be given as a path, which may have moved
FILLED = ("lr", "adam_eps", "budget", "max_length")  # None: the default of the method or task


class ManifestWriter(TrainerCallback):
    """Write the manifest once the Trainer has written a checkpoint.

    Args:
        config: the job.
        inputs: hashes of what it trains, by what they are of: `hash_examples`, `hash_weights`.
    """

    def __init__(self, config: FinetuneConfig, inputs: dict[str, str]) -> None:
        self.config, self.inputs = config, inputs

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log, evaluate and save as often as this job says, not as the one that is resumed did."""
        state.compute_steps(args, state.max_steps)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Hash the files of the checkpoint of this step; then remove the oldest ones.

        The Trainer would remove them first: a job killed in between would have no whole checkpoint.
        """
        wait_for_all()  # each process writes the state of its random numbers
        if not state.is_world_process_zero:
            return
        folder = folder_of(args, state)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        record = {
            "config": comparable(self.config),
            "inputs": self.inputs,
            "files": {
                path.relative_to(folder).as_posix(): hash_file(path)
                for path in files
                if path.name != MANIFEST
            },
        }
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(record, indent=1))
        rotate_checkpoints(str(args.output_dir), self.config.save_total_limit, use_mtime=True)


def folder_of(args: TrainingArguments, state: TrainerState) -> Path:
    """The Trainer's folder for a checkpoint of this step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def saved_rate(folder: Path) -> float:
    """The learning rate of the job that wrote a checkpoint of this job."""
    rate: float = read_record(folder / MANIFEST)["config"]["lr"]
    return rate


def find_last(folder: Path, config: FinetuneConfig) -> Path:
    """The newest checkpoint in a folder that can resume a job.

    Raises:
        FinetuneError: there is none, or what keeps the newest from resuming it.
    """
    found = [path for path in folder.glob("checkpoint-*") if step_of(path) is not None]
    found.sort(key=lambda path: step_of(path) or 0, reverse=True)
    if not found:
        raise FinetuneError(
            f"--resume last: no checkpoint in {folder}: begin without --resume, and with "
            "--save-every to get some"
        )
    for path in found:
        if find_problem(path, config) is None:
            return path
    raise FinetuneError(f"--resume last: {found[0]}: {find_problem(found[0], config)}")


def check_checkpoint(folder: Path, config: FinetuneConfig) -> None:
    """Raise FinetuneError unless a checkpoint is whole and of the same job.

    The message names what differs, and the newest older checkpoint that would do.
    """
    problem = find_problem(folder, config)
    if problem is not None:
        raise FinetuneError(f"--resume: {folder}: {problem}; {advice(folder, config)}")


def check_inputs(folder: Path, inputs: dict[str, str]) -> None:
    """Raise FinetuneError if the run that wrote the checkpoint had another base or examples."""
    saved = read_record(folder / MANIFEST).get("inputs")
    for name, value in inputs.items():
        if not isinstance(saved, dict) or saved.get(name) != value:
            raise FinetuneError(
                f"--resume: {folder} was trained with another {name}: it has changed since. "
                "Restore it, or begin anew without --resume"
            )


def find_problem(folder: Path, config: FinetuneConfig) -> str | None:
    """What keeps a checkpoint from resuming this job; None: nothing."""
    if not (folder / "trainer_state.json").is_file():
        return "not a checkpoint of the Trainer (it has no trainer_state.json)"
    record = read_record(folder / MANIFEST)
    files = record.get("files")
    if not isinstance(files, dict):
        return f"it is incomplete (no {MANIFEST}): saving was cut short"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"it is incomplete: {name} is missing"
        if hash_file(folder / name) != expected:
            return f"it is damaged: {name} is not what was saved"
    theirs, ours = record.get("config"), comparable(config)
    if not isinstance(theirs, dict):
        return f"it is damaged: {MANIFEST} is not what was saved"
    theirs = completed(theirs, config)
    for name in ours:
        if theirs[name] == ours[name] or (name == "max_length" and may_be_equal(theirs, ours)):
            continue
        if name == "lr" and ours[name] == AUTO:  # a job that found its rate has it in the manifest
            continue
        return (
            f"it is of another job: {option(name)} was {theirs[name]!r}, now it is {ours[name]!r}"
        )
    return None


def completed(theirs: dict[str, Any], config: FinetuneConfig) -> dict[str, Any]:
    """The settings of a manifest, with those that an earlier version lacked or left at None."""
    missing = {field.name: field.default for field in dataclasses.fields(config)}
    missing |= {"rank": "all", "every": 1}  # before there was a choice
    values: dict[str, Any] = json.loads(json.dumps(missing, default=str)) | theirs
    unset = dataclasses.replace(config, lr=None, adam_eps=None, budget=None, max_length=None)
    for name, default in comparable(unset).items():
        if name in FILLED and values[name] is None:
            values[name] = default
    return values


def may_be_equal(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Whether one --max-length is None, and the other one a default that None may stand for.

    The default depends on the task, which may not be known before the data is loaded. Then
    `check_inputs` compares the tokenised training examples. It does not compare those of the
    evaluation, so with --best or --series a number is never equal to None.
    """
    lengths = {theirs["max_length"], ours["max_length"]}
    judges = "eval_split" in ours
    return (
        not judges
        and None in lengths
        and lengths <= {None, *(task.max_length for task in TASKS.values())}
    )


def advice(folder: Path, config: FinetuneConfig) -> str:
    """Which checkpoint to take instead."""
    number = step_of(folder)
    older = [
        path
        for path in folder.resolve().parent.glob("checkpoint-*")
        if number is not None and (step_of(path) or number) < number
    ]
    for path in sorted(older, key=lambda path: step_of(path) or 0, reverse=True):
        if find_problem(path, config) is None:
            return f"resume from {path}"
    return "no older checkpoint fits: begin anew without --resume"


def step_of(folder: Path) -> int | None:
    """The step in the name of a checkpoint."""
    digits = folder.name.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else None


def read_record(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def comparable(config: FinetuneConfig) -> dict[str, Any]:
    """The settings that determine what is trained, as JSON gives them back.

    Defaults of the method are filled in, and those of the task if it is known without the data.
    """
    free = FREE
    if config.keeps_best:
        free = FREE - JUDGES
    elif config.series is not None:
        free = FREE - SERIES_JUDGES
    used = dataclasses.asdict(resolved(config))
    values = {name: value for name, value in used.items() if name not in free}
    if config.method != "id3":
        del values["every"]
    builtin = DATASETS.get(config.dataset)
    task = config.task or (None if builtin is None else builtin.task)
    if task is not None:
        values["max_length"] = config.max_length or TASKS[task].max_length
        if TASKS[task].writes:
            values["max_target_length"] = config.max_target_length or MAX_TARGET_LENGTH
    for name in PLACES:
        if Path(values[name]).expanduser().exists():
            values[name] = Path(values[name]).expanduser().resolve().name
    read: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return read


def hash_file(path: Path) -> str:
    """xxh3_128 of a file, as 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def hash_examples(examples: Dataset) -> str:
    """xxh3_128 of tokenised examples in order, as 32 hex digits."""
    table = examples.with_format("arrow")[:].combine_chunks()
    digest = xxhash.xxh3_128()
    sink = pa.PythonFile(_Hashing(digest.update), mode="w")
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table.replace_schema_metadata(None))
    return digest.hexdigest()


class _Hashing:
    """A file that takes what is written and keeps nothing."""

    closed = False

    def __init__(self, update: Callable[[bytes], None]) -> None:
        self._update = update

    def write(self, piece: bytes) -> int:
        """Take a piece."""
        self._update(piece)
        return len(piece)

    def flush(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""
