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

from sparse_optim.analysis import ALLOCATION_FILE
from sparse_optim.finetune.config import FinetuneConfig
from sparse_optim.finetune.config_file import CONFIG_FILE
from sparse_optim.finetune.errors import FinetuneError

DELTA_FILE, METRICS_FILE, PLOT_FILE = "delta.safetensors", "metrics.json", "curves.png"
MODEL_FOLDER, ADAPTER_FOLDER, CHECKPOINTS = "model", "adapter", "checkpoints"
FILES = (DELTA_FILE, METRICS_FILE, CONFIG_FILE, PLOT_FILE, ALLOCATION_FILE)
RESULTS = (*FILES, MODEL_FOLDER, ADAPTER_FOLDER)


def check_output(config: FinetuneConfig) -> None:
    """Raise FinetuneError for an output folder in use, or a missing checkpoint."""
    output, resume = config.output, config.resume
    if resume is not None and not (resume / "trainer_state.json").is_file():
        raise FinetuneError(f"--resume: {resume} is not a Trainer checkpoint")
    if output.exists() and not output.is_dir():
        raise FinetuneError(f"--output: {output} is a file")
    for option, value in (("--model", config.model), ("--dataset", config.dataset)):
        if Path(value).exists() and _is_inside(Path(value), output):
            raise FinetuneError(
                f"{option}: {value} is inside --output {output}, where results are replaced: "
                "name another output folder"
            )
    goes_on = resume is not None and _is_inside(resume, output / CHECKPOINTS)
    if output.is_dir() and any(output.iterdir()) and not (config.overwrite or goes_on):
        raise FinetuneError(f"--output: {output} is not empty; add --overwrite or name another")
    known = earlier_results(output)
    for name in RESULTS:
        if (output / name).exists() and name not in known:
            raise FinetuneError(
                f"--output: {output / name} is not listed in {output / METRICS_FILE}, so no "
                "earlier job wrote it: move it away, or name another output folder"
            )


def earlier_results(output: Path) -> set[str]:
    """Names of the results that an earlier job wrote here, as its metrics.json lists them."""
    try:
        record = json.loads((output / METRICS_FILE).read_text())
    except (OSError, ValueError):
        return set()
    listed = record.get("files", FILES) if isinstance(record, dict) else ()
    return {name for name in listed if name in RESULTS}


@contextmanager
def replaced_results(output: Path) -> Iterator[Path]:
    """Yield a folder to write results to; they then take the places of an earlier job's.

    Raises:
        OSError: the folder cannot be written, or the disk is full; the earlier results stay.
    """
    output.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=output))
    try:
        yield new
        _exchange(output, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(output: Path, new: Path) -> None:
    """Move the earlier results away, the new ones in; then remove the earlier ones."""
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=output))
    earlier = [name for name in earlier_results(output) if (output / name).exists()]
    placed: list[str] = []
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
        old.rmdir()  # empty: all of it is back
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
