"""The output folder of a job: what it may replace there, and how.

New results are written aside and then take the places of the old ones, so that a full disk leaves
the old ones. Only what an earlier job lists in its metrics.json is ever removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparse_optim.analysis import ALLOCATION_FILE
from sparse_optim.analysis import METRICS_FILE as METRICS_FILE
from sparse_optim.files import remove
from sparse_optim.finetune.card import CARD_FILE
from sparse_optim.finetune.checkpoints import MANIFEST, check_checkpoint, read_record, step_of
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.config_file import CONFIG_FILE
from sparse_optim.finetune.errors import FinetuneError

DELTA_FILE, PLOT_FILE = "delta.safetensors", "curves.png"
MODEL_FOLDER, ADAPTER_FOLDER, CHECKPOINTS = "model", "adapter", "checkpoints"
SERIES_FOLDER = "series"
TRACKS = "runs"  # of TensorBoard: a folder for each job, beside those of earlier ones
FILES = (DELTA_FILE, METRICS_FILE, CONFIG_FILE, PLOT_FILE, ALLOCATION_FILE, CARD_FILE)
RESULTS = (*FILES, MODEL_FOLDER, ADAPTER_FOLDER, SERIES_FOLDER)
LOCK, NEW, OLD = ".lock", ".sparse-optim-new-", ".sparse-optim-old-"
JOURNAL = "journal.json"  # in an OLD folder: which folder the new results come from, and which
TRIAL_FILES, TRIAL_BYTES = 8, 1 << 17


def check_output(config: FinetuneConfig) -> None:
    """Raise FinetuneError for an output folder in use, or a missing checkpoint."""
    output, resume = config.output, config.resume
    if resume is not None:
        check_checkpoint(resume, config)
    for option, value in (("--model", config.model), ("--dataset", config.dataset)):
        if Path(value).exists() and _is_inside(Path(value), output):
            raise FinetuneError(
                f"{option}: {value} is inside --output {output}, where results are replaced: "
                "name another output folder"
            )
    goes_on = resume is not None and _is_inside(resume, output / CHECKPOINTS)
    if resume is not None and goes_on and not config.overwrite:
        _check_unfinished(output, resume)
    if _contents(output) and not (config.overwrite or goes_on):
        saved = (output / CHECKPOINTS).glob("checkpoint-*")
        newest = max(saved, key=lambda path: step_of(path) or 0, default=None)
        hint = f"; --resume last goes on from {newest}" if newest else ""
        raise FinetuneError(
            f"--output: {output} is not empty; add --overwrite or name another{hint}"
        )
    known = earlier_results(output)
    for name in RESULTS:
        if (output / name).exists() and name not in known:
            raise FinetuneError(
                f"--output: {output / name} is not listed in {output / METRICS_FILE}, so no "
                "earlier job wrote it: move it away, or name another output folder"
            )


def is_unfinished(folder: Path) -> bool:
    """Whether a folder is of a run that has saved checkpoints, and no results."""
    return (folder / CHECKPOINTS).is_dir() and not (folder / DELTA_FILE).exists()


def _check_unfinished(output: Path, resume: Path) -> None:
    """Raise FinetuneError if the run has ended, and no checkpoint is newer than this one.

    The results would be written again, with the timings of the few steps that are left or of none.
    Results that are older than the checkpoint are of an earlier run, which this one replaces.
    """
    metrics, manifest = output / METRICS_FILE, resume / MANIFEST
    steps = read_record(metrics).get("steps")
    if steps is None or metrics.stat().st_mtime_ns < manifest.stat().st_mtime_ns:
        return
    newest = max(step_of(path) or 0 for path in resume.parent.glob("checkpoint-*"))
    if step_of(resume) == newest:
        raise FinetuneError(
            f"--resume: nothing is left to do: the run in {output} ended at step {steps}, and its "
            "results are there (--overwrite writes them again, without the timings of its steps)"
        )


def _contents(output: Path) -> list[Path]:
    """What an output folder holds, but for what a killed job leaves before its first checkpoint."""
    if not output.is_dir():
        return []
    leftover = (LOCK, TRACKS, *(() if _holds(output / CHECKPOINTS) else (CHECKPOINTS,)))
    return [
        path
        for path in output.iterdir()
        if path.name not in leftover and not path.name.startswith(NEW)
    ]


def _holds(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other jobs out of an output folder, and try whether it can be written.

    Raises:
        FinetuneError: another job is writing there, or the folder cannot be written.
    """
    if output.exists() and not output.is_dir():
        raise FinetuneError(f"--output: {output} is a file")
    made = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise FinetuneError(f"--output: another job is writing to {output}") from None
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        _recover(output)
        _try_writing(output)
        yield
    finally:
        (output / LOCK).unlink(missing_ok=True)
        lock.release()
        for folder in (output / CHECKPOINTS, *([output] if made else [])):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _try_writing(output: Path) -> None:
    """Raise FinetuneError if files cannot be written: better now than after the training."""
    trial = Path(tempfile.mkdtemp(prefix=NEW, dir=output))
    try:
        for number in range(TRIAL_FILES):
            with open(trial / str(number), "wb") as file:
                file.write(bytes(TRIAL_BYTES))
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise _unwritable(output, error) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _unwritable(output: Path, error: OSError) -> FinetuneError:
    return FinetuneError(f"--output: {output} cannot be written ({error.strerror or error})")


def _recover(output: Path) -> None:
    """Put back the results that a killed job was exchanging, and remove what it had begun."""
    for old in output.glob(f"{OLD}*"):
        journal = read_record(old / JOURNAL)
        names = [name for name in _listed(journal, "new") if name in RESULTS]
        new = output / str(journal.get("from"))
        placed = [name for name in names if not (new / name).exists()]
        if len(placed) < len(names):  # else all of them are in place
            for name in placed:
                remove(output / name)
            for path in [path for path in old.iterdir() if path.name in RESULTS]:
                remove(output / path.name)
                os.replace(path, output / path.name)
        shutil.rmtree(old, ignore_errors=True)
    for new in output.glob(f"{NEW}*"):
        shutil.rmtree(new, ignore_errors=True)


def _listed(record: dict[str, Any], key: str) -> list[str]:
    names = record.get(key)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def earlier_results(output: Path) -> set[str]:
    """Names of the results that an earlier job wrote here, as its metrics.json lists them."""
    record = read_record(output / METRICS_FILE)
    listed = _listed(record, "files") if "files" in record else list(FILES) if record else []
    return {name for name in listed if name in RESULTS}


@contextmanager
def replaced_results(output: Path) -> Iterator[Path]:
    """Yield a folder to write results to; they then take the places of an earlier job's.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the earlier results stay.
    """
    output.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=NEW, dir=output))
    try:
        yield new
        _exchange(output, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(output: Path, new: Path) -> None:
    """Move the earlier results away, the new ones in; then remove the earlier ones."""
    old = Path(tempfile.mkdtemp(prefix=OLD, dir=output))
    earlier = [name for name in earlier_results(output) if (output / name).exists()]
    placed: list[str] = []
    journal = {"from": new.name, "new": sorted(path.name for path in new.iterdir())}
    (old / JOURNAL).write_text(json.dumps(journal))
    try:
        for name in earlier:
            os.replace(output / name, old / name)
        for path in sorted(new.iterdir()):
            os.replace(path, output / path.name)
            placed.append(path.name)
    except BaseException:
        for name in placed:
            os.replace(output / name, new / name)
        for name in earlier:
            if (old / name).exists():
                os.replace(old / name, output / name)
        shutil.rmtree(old, ignore_errors=True)  # all of it is back
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
