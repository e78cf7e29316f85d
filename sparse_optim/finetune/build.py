"""Build the model that a job begins with: the base, a fresh head, an adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection

import xxhash
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from sparse_optim.delta._fingerprint import raw_bytes
from sparse_optim.finetune.adapters import attach_adapter
from sparse_optim.finetune.errors import FinetuneError
from sparse_optim.finetune.models import LoadedModel, ModelSource, load_base_model
from sparse_optim.finetune.spec import ModelSpec

LoadModel = Callable[[ModelSource, ModelSpec, PreTrainedTokenizerBase], LoadedModel]


def build(
    source: ModelSource,
    spec: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    load: LoadModel = load_base_model,
) -> LoadedModel:
    """Load the base, with its adapter if there is one; `spec.dense` parameters count as fresh.

    Fresh values depend only on the seed: a second call returns the same model.

    Args:
        load: may take the base model from memory.

    Raises:
        FinetuneError: the model cannot be loaded, or has no such parameters or places.
    """
    set_seed(spec.seed)
    loaded = load(source, spec, tokenizer)
    names = [name for name, _ in loaded.model.named_parameters()]
    for prefix in spec.dense:
        if not any(name.startswith(prefix) for name in names):
            raise FinetuneError(f"--dense: no parameter's name begins with {prefix!r}")
    dense = {name for name in names if name.startswith(spec.dense)} if spec.dense else set()
    fresh = loaded.fresh | dense
    if spec.adapter is None:
        return LoadedModel(loaded.model, fresh)
    set_seed(spec.seed)  # again: how many numbers loading draws depends on where the model is
    placing = (spec.adapter_alpha, spec.adapter_targets)
    adapted = attach_adapter(loaded.model, spec.adapter, spec.adapter_rank, fresh, *placing)
    return LoadedModel(*adapted)


def hash_weights(model: nn.Module, without: Collection[str] = ()) -> str:
    """xxh3_128 of a model's tensors, as 32 hex digits.

    Args:
        without: names of tensors to leave out. peft's copies of modules that are trained whole are
            left out with them.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        if name in without or (without and ".original_module." in name):
            continue
        digest.update(name.encode())
        for piece in raw_bytes(tensor):
            digest.update(piece)
    return digest.hexdigest()
