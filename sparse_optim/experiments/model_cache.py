"""Keep a base model in memory between the cells of an experiment."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedTokenizerBase

from sparse_optim.finetune.models import LoadedModel, ModelSource, load_base_model
from sparse_optim.finetune.spec import ModelSpec

# Larger base models are loaded again for each cell, not kept beside the one that is trained.
KEPT_MODEL_BYTES = 2 * 2**30


class ModelCache:
    """Keep a base model in memory if its checkpoint has all parameters.

    A fresh head depends on the seed of the run, so a model with one is loaded again.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], LoadedModel] = {}

    def __call__(
        self,
        source: ModelSource,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerBase,
    ) -> LoadedModel:
        """Same as `load_base_model`."""
        key = (source, spec.task, spec.dtype, spec.pooling, spec.lengths.targets)
        if key not in self.kept:
            loaded = load_base_model(source, spec, tokenizer)
            size = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
            if loaded.fresh or size > KEPT_MODEL_BYTES:
                return loaded
            self.kept = {key: loaded}
        kept = self.kept[key]
        return LoadedModel(copy.deepcopy(kept.model), kept.fresh)
