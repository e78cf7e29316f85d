"""Convert a GGUF file to a transformers folder once, and keep the folder in the hub's cache.

transformers parses the whole file for the config, the tokenizer and the weights alike: a start with
SmolLM2-135M took 40 s, of which the folder leaves two.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from filelock import FileLock
from huggingface_hub import cached_assets_path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

logger = logging.getLogger(__name__)

FINISHED, UNFINISHED = "model", "unfinished"
OWNER = "converted-from"  # holds the path of the file
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def converted(folder: str, file: str) -> str:
    """The folder with float32 weights, config and tokenizer of a GGUF file (a causal LM).

    It is kept under `HF_ASSETS_CACHE`, or only for this process if that cannot be written. Another
    file or another version of transformers gets another folder. Processes wait for each other.

    Raises:
        Exception: transformers cannot read the file.
    """
    path = Path(folder) / file
    found = path.stat()
    facts = (str(path.resolve()), found.st_size, found.st_mtime_ns, transformers.__version__)
    name = f"{path.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:12]}"
    if name in _here:
        return _here[name].name
    try:
        kept = cached_assets_path("sparse_optim", namespace="gguf", subfolder=name)
        if not (kept / FINISHED).is_dir():  # no lock for what is there: it may be read-only
            with FileLock(kept / "lock"):
                _keep(folder, file, kept)
        return str(kept / FINISHED)
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        logger.warning("%s is converted for this process alone: %s", file, error)
    place = tempfile.TemporaryDirectory(prefix="sparse-optim-gguf-")
    try:
        convert(folder, file, Path(place.name))
    except BaseException:
        place.cleanup()
        raise
    _here[name] = place
    return place.name


def _keep(folder: str, file: str, kept: Path) -> None:
    """Convert into a folder that this process has locked, unless another one has done it."""
    if (kept / FINISHED).is_dir():
        return
    shutil.rmtree(kept / UNFINISHED, ignore_errors=True)  # of a killed process
    try:
        convert(folder, file, kept / UNFINISHED)
        (kept / UNFINISHED).rename(kept / FINISHED)
        owner = str((Path(folder) / file).resolve())
        for old in kept.parent.glob(f"*/{OWNER}"):  # of the file before it changed
            if old.parent != kept and old.read_text() == owner:
                shutil.rmtree(old.parent, ignore_errors=True)
        (kept / OWNER).write_text(owner)
    finally:  # it may be many gigabytes
        shutil.rmtree(kept / UNFINISHED, ignore_errors=True)


_here: dict[str, tempfile.TemporaryDirectory[str]] = {}  # deleted when the process ends


def convert(folder: str, file: str, target: Path) -> None:
    """Read a GGUF file and write what it holds as a transformers folder."""
    logger.info("converting %s: once, about half a minute", file)
    config = AutoConfig.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, config=config, dtype=torch.float32
    )
    without_quantizer(model).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def without_quantizer(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights to a plain model. A model read from GGUF stays marked as quantized although
    its weights are not, and Trainer and `save_pretrained` reject it."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.to(model.dtype)  # type: ignore[arg-type]  # transformers' wrapper hides the signature
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
