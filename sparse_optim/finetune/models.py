"""Load a base model, and find the parameters that its checkpoint lacks."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils.hub import cached_file

from sparse_optim.finetune.builtin_data import MODELS
from sparse_optim.finetune.encode import Targets
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.gguf import converted
from sparse_optim.finetune.hub import hub_error, require_hub
from sparse_optim.finetune.mean_pooling import MeanPooledBert, MeanPooledBertConfig
from sparse_optim.finetune.quiet import quiet
from sparse_optim.finetune.seq2seq import set_decoding
from sparse_optim.finetune.spec import ModelSpec
from sparse_optim.finetune.tasks import TASKS

logger = logging.getLogger(__name__)

POSITIONS = re.compile(r"(^|\.)(wpe|(position_embeddings|embed_positions|position_embedding))$")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEQUENCE_CLASS = "AutoModelForSequenceClassification"

AutoConfig.register(MeanPooledBertConfig.model_type, MeanPooledBertConfig)
AutoModelForSequenceClassification.register(MeanPooledBertConfig, MeanPooledBert)


@dataclass(frozen=True)
class ModelSource:
    """The name of a base model, and where it is: a folder or hub id."""

    name: str
    location: str


@dataclass(frozen=True)
class LoadedModel:
    """A model, and the names of the parameters that its checkpoint lacks (a fresh head)."""

    model: PreTrainedModel
    fresh: frozenset[str]


def find_model(name: str) -> ModelSource:
    """Find a model by built-in name, local folder, local GGUF file or hub id.

    Raises:
        FinetuneError: the package, the folder or the network is missing.
    """
    if name in MODELS:
        source = MODELS[name]
        folder = source.package.path(source.folder, f"model {name!r}")
        if source.gguf_file is not None:
            return of_gguf(name, folder / source.gguf_file)
        return ModelSource(name, str(folder))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return of_gguf(name, path)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FinetuneError(f"{name} has no config.json: not a transformers model folder")
        return ModelSource(name, str(path))
    require_hub("model", name, MODELS)
    return ModelSource(name, name)


def of_gguf(name: str, path: Path) -> ModelSource:
    """The source of a GGUF file: the folder that it was converted to.

    Raises:
        FinetuneError: the file cannot be read.
    """
    try:
        return ModelSource(name, converted(str(path.parent), path.name))
    except Exception as error:  # a cut file fails anywhere in the loader
        raise hub_error("model", name, MODELS, error) from error


def local_folder(source: ModelSource) -> Path:
    """The folder of a base model's files; a hub model is downloaded.

    Raises:
        FinetuneError: the hub does not give the model.
    """
    if Path(source.location).is_dir():
        return Path(source.location)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.location))
    except Exception as error:  # the hub's client raises many kinds
        raise hub_error("model", source.name, MODELS, error) from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; without a padding token, pad with the end token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    except Exception as error:  # a damaged tokenizer.json fails anywhere in the loader
        raise hub_error("model", source.name, MODELS, error) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FinetuneError(
                f"the tokenizer of {source.name} has neither a padding token nor an end token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(
    source: ModelSource, spec: ModelSpec, tokenizer: PreTrainedTokenizerBase
) -> LoadedModel:
    """Load the base model with the head that the task needs.

    A parameter is fresh if `from_pretrained` reports that the checkpoint lacks it or has it in
    another shape (a head for other classes). If the checkpoint has everything, including a head,
    nothing is fresh, and the head is ranked within the budget like the rest.

    Raises:
        FinetuneError: the model cannot be loaded, or does not write what the task needs.
    """
    try:
        check_writes(source, spec.task)
        arguments = spec.model_arguments()
        kind: Any
        if is_mean_pooled(source, spec):
            values, _ = BertConfig.get_config_dict(source.location)
            values["model_type"] = MeanPooledBertConfig.model_type
            config = MeanPooledBertConfig.from_dict(values, **arguments)
            kind, arguments = MeanPooledBert, {"config": config}
        else:
            kind = getattr(transformers, TASKS[spec.task].model_class)
        with quiet(source.location):
            model, info = kind.from_pretrained(
                source.location,
                **arguments,
                dtype=DTYPES[spec.dtype],
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except FinetuneError:
        raise
    except Exception as error:  # a cut file or an odd config.json fails anywhere in the loader
        raise hub_error("model", source.name, MODELS, error) from error
    # A decoder's classifier reads the last token that is not padding: the tokenizer's, whatever
    # config.json says.
    model.config.pad_token_id = tokenizer.pad_token_id
    targets = spec.lengths.targets
    if targets is not None:
        set_decoding(model, targets)
    fresh = fresh_parameters(model, info)
    logger.info("fresh parameters, trained densely: %s", ", ".join(sorted(fresh)) or "none")
    return LoadedModel(model, fresh)


def load_bare_model(
    source: ModelSource, task: str | None, dtype: str, *, allow_fresh: bool = True
) -> PreTrainedModel:
    """Load the base model with the head of a task; without a task, as its config.json says.

    Args:
        allow_fresh: whether parameters that the checkpoint lacks may have random values.

    Raises:
        FinetuneError: an unknown task, the model cannot be loaded, or it lacks parameters.
    """
    if task is not None and task not in TASKS:
        raise FinetuneError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    try:
        if task is None:
            config = AutoConfig.from_pretrained(source.location)
            name = (config.architectures or ["AutoModel"])[0]
        else:
            name = TASKS[task].model_class
        model: PreTrainedModel
        with quiet(source.location):
            model, info = getattr(transformers, name).from_pretrained(
                source.location, dtype=DTYPES[dtype], output_loading_info=True
            )
    except Exception as error:  # as in `load_base_model`
        raise hub_error("model", source.name, MODELS, error) from error
    fresh = sorted(fresh_parameters(model, info))
    if fresh and not allow_fresh:
        raise FinetuneError(
            f"model {source.name!r} has no {', '.join(fresh[:3])}: the values would be random, not "
            "those that training began with. Give the model that `model.save_pretrained` wrote "
            "before the first step"
        )
    return model


def is_mean_pooled(source: ModelSource, spec: ModelSpec) -> bool:
    """Whether the job's class is `MeanPooledBert`, or else the standard one of the task.

    "auto" reads the model type that an earlier job wrote, then the file in which
    sentence-transformers models declare how they pool.

    Raises:
        FinetuneError: mean pooling is asked for, and the model is no BERT.
    """
    if spec.pooling == "cls" or TASKS[spec.task].model_class != SEQUENCE_CLASS:
        return False
    kind = AutoConfig.from_pretrained(source.location).model_type
    if kind == MeanPooledBertConfig.model_type:
        return True
    if spec.pooling == "mean":
        if kind != "bert":
            raise FinetuneError(f"--pooling mean is for BERT, and {source.name} is {kind}")
        return True
    if kind != "bert":
        return False
    file = cached_file(
        source.location, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False
    )
    declared = {} if file is None else json.loads(Path(file).read_text())
    return bool(declared.get("pooling_mode_mean_tokens"))


def read_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of a base model.

    Raises:
        FinetuneError: it cannot be loaded.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.location)
    except Exception as error:  # as in `load_base_model`
        raise hub_error("model", source.name, MODELS, error) from error
    return config


def check_writes(source: ModelSource, task: str) -> None:
    """Raise FinetuneError if the task is to write texts, and the model cannot do that.

    An encoder sees the tokens that it should predict. Summaries are written by encoder-decoders, as
    continuations by decoders.
    """
    if task not in ("causal-lm", "summarization"):
        return
    config = read_config(source)
    kind = config.model_type
    if task == "summarization":
        if kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            return
        is_decoder = (
            kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
        hint = ", or --task causal-lm" if is_decoder else ""
        raise FinetuneError(
            f"model {source.name!r} ({kind}) is not an encoder-decoder, so it cannot be fine-tuned "
            f"for summarization; use one such as facebook/bart-base or google-t5/t5-base{hint}"
        )
    if config.is_encoder_decoder:
        raise FinetuneError(
            f"model {source.name!r} ({kind}) is an encoder-decoder: use --task summarization, or "
            "for causal-lm a decoder such as smollm2-135m"
        )
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if encoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise FinetuneError(
            f"model {source.name!r} ({kind}) does not generate text, so it cannot be fine-tuned "
            "for causal-lm; use a decoder such as smollm2-135m, or another --task"
        )


def fresh_parameters(model: PreTrainedModel, info: dict[str, Any]) -> frozenset[str]:
    """Names of the parameters that the loader initialised."""
    mismatched: Iterable[Any] = info.get("mismatched_keys", ())
    names = set(info.get("missing_keys", ())) | {
        key if isinstance(key, str) else key[0] for key in mismatched
    }
    # A tied weight may be reported missing though its twin was loaded: named_parameters drops it.
    return frozenset(name for name, _ in model.named_parameters() if name in names)


def check_lengths(model: PreTrainedModel, longest: int, targets: Targets | None = None) -> None:
    """Raise FinetuneError if examples are longer than a table of learned positions.

    RoBERTa's family begins to count behind the padding index; OPT and BART have an offset.
    """
    source = "--max-length", longest, f"an example has {longest} tokens"
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or not POSITIONS.search(name):
            continue
        skipped = getattr(module, "offset", 0)
        if module.padding_idx is not None:
            skipped = module.padding_idx + 1
        positions = module.num_embeddings - skipped
        option, needed, about = source
        if targets is not None and "decoder." in name:
            option, needed = "--max-target-length", targets.max_length
            about = f"summaries have up to {needed} tokens"
        if needed > positions:
            raise FinetuneError(
                f"{option}: {about}, and the model has positions for {positions}: use {option} "
                f"{positions}"
            )


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads, and disable the tokenizers' pool, which competes with them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads is not None:
        torch.set_num_threads(threads)
