"""Use the result of a job: build its model again from a run folder or a delta file."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from sparse_optim.delta import Delta, apply_delta, load_delta
from sparse_optim.files import replacing
from sparse_optim.finetune.build import build, hash_weights
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.hub import explain, hub_is_reachable
from sparse_optim.finetune.models import find_model, load_tokenizer
from sparse_optim.finetune.output import DELTA_FILE, SERIES_FOLDER, is_unfinished
from sparse_optim.finetune.series import find_members
from sparse_optim.finetune.spec import ModelSpec, read_spec

# A run on the hub, or a member of its series: USER/NAME/series/050.safetensors.
HUB_ID = re.compile(rf"([\w.-]+/[\w.-]+)(?:/({SERIES_FOLDER}/\d+\.safetensors))?")


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model: the trained weights, the tokenizer, and how it was built."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    spec: ModelSpec


def load_model(
    run: str | os.PathLike[str],
    *,
    base: str | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the model that a job trained, in evaluation mode, and its tokenizer.

    The base is loaded as the class that was trained, with its labels and its adapter; then the
    delta is applied. The result has the bits of the trained model.

    Args:
        run: a folder that `finetune` wrote, its delta file, a file of its series, or the hub id of
            a pushed run (with "/series/050.safetensors": of a member).
        base: where the base model is now (built-in name, folder, GGUF file or hub id), if it is no
            longer where the job found it.
        device: moves the model there.

    Raises:
        FinetuneError: no delta there, a delta that does not say how its model is built, or a base
            that cannot be loaded.
        DeltaError: a damaged delta, or another base.

    Examples:
        >>> import sparse_optim
        >>> from transformers import pipeline
        >>> model, tokenizer = sparse_optim.load_model("out")  # doctest: +SKIP
        >>> classify = pipeline("text-classification", model=model, tokenizer=tokenizer)  # doctest: +SKIP
    """  # noqa: E501
    tuned = load_tuned(run, base)
    model = tuned.model if device is None else tuned.model.to(device)
    return model, tuned.tokenizer


def load_tuned(run: str | os.PathLike[str], base: str | None = None) -> Tuned:
    """Same as `load_model`, with the note of how the model was built."""
    path = find_delta(run)
    delta = load_delta(path)
    return rebuild(delta, described(delta, path), base)


def find_delta(run: str | os.PathLike[str]) -> Path:
    """The delta file of a run folder, a file itself, or that of a run on the hub.

    Raises:
        FinetuneError: there is none.
    """
    path = Path(run).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / DELTA_FILE).is_file():
            return path / DELTA_FILE
        members = [file.name for file in find_members(path)]
        if members:
            raise FinetuneError(
                f"{path} has several models: name one of its files: {', '.join(members)}"
            )
        if is_unfinished(path):
            raise FinetuneError(f"{path} has no {DELTA_FILE} (an unfinished run)")
        raise FinetuneError(
            f"{path} has no {DELTA_FILE}: give a folder that `sparse-optim finetune` wrote"
        )
    from huggingface_hub import hf_hub_download, is_offline_mode

    named = HUB_ID.fullmatch(str(run))
    if named is None or not (is_offline_mode() or hub_is_reachable()):
        why = "the hub cannot be reached" if named else "it is no hub id"
        raise FinetuneError(f"{run}: no such folder or file, and {why}")
    try:
        return Path(hf_hub_download(named[1], named[2] or DELTA_FILE))
    except Exception as error:  # the hub's client raises many kinds
        reason = explain("model", str(run), error)
        raise FinetuneError(f"{run}: no such folder or file, and from the hub: {reason}") from error


def described(delta: Delta, path: Path) -> ModelSpec:
    """The model that a delta's note describes.

    Raises:
        FinetuneError: it describes none.
    """
    spec = read_spec(delta)
    if spec is None:
        raise FinetuneError(
            f"{path} does not say how its model is built (`sparse-optim finetune` writes that): "
            "build the model as you did for training, then call sparse_optim.apply_delta"
        )
    return spec


def rebuild(delta: Delta, spec: ModelSpec, base: str | None = None) -> Tuned:
    """Build the model of a note, apply the delta, and switch to evaluation mode."""
    try:
        source = find_model(base or spec.base)
    except FinetuneError as error:
        if base is not None:
            raise
        raise FinetuneError(
            f"the base model is not where the run found it: {error}; say where it is now by --base "
            "(base= in Python)"
        ) from None
    tokenizer = load_tokenizer(source)
    with kept_random_state():
        built = build(source, spec, tokenizer)
    if spec.weights not in (None, hash_weights(built.model, without=built.fresh)):
        raise FinetuneError(
            f"{source.name} is not the base model that was fine-tuned: some of its weights differ"
        )
    model = built.model
    apply_delta(model, delta)
    model.eval()
    return Tuned(model, tokenizer, spec)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave the random numbers of the caller as they are: building a model seeds them."""
    python, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def write_model(tuned: Tuned, folder: Path) -> None:
    """Write a model folder: weights, configuration, tokenizer. It appears whole or not at all.

    An adapter of peft is merged into the weights.

    Raises:
        FinetuneError: the folder is not empty, or no class of transformers can hold the model.
        OSError: the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FinetuneError(f"{folder}: expected a new or empty folder: choose another name")
    model = tuned.model
    if hasattr(model, "peft_config"):
        model = model.merge_and_unload()
    elif tuned.spec.adapter is not None:
        raise FinetuneError(
            f"no class of transformers has {tuned.spec.adapter} adapters: use "
            "sparse_optim.load_model, or load the run's folder adapter/"
        )
    if model.can_generate():
        model.config.use_cache = True  # the Trainer has switched it off
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        model.save_pretrained(temporary)
        tuned.tokenizer.save_pretrained(temporary)
