"""Record gradients of a real fine-tuning run of MiniLM, on the data sets that ship as packages."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL = "MiniLM"
BATCH_SIZE = 16
RUN_STEPS = 100  # of the whole run, which ends as soon as the gradients are there


class _Reached(Exception):  # noqa: N818
    """End the training: the gradients of the wanted step are there."""


@lru_cache(maxsize=1)  # bench.steps asks for the same twice
def record(dataset: str, step: int, dtype: torch.dtype) -> list[Tensor]:
    """Fine-tune MiniLM with dense AdamW; return its parameters with the gradients of a step.

    Args:
        dataset: a built-in data set of `sparse-optim finetune`.
        step: optimizer step whose gradients are wanted, 1 to RUN_STEPS.
        dtype: dtype to round parameters and gradients to; the training is in float32.

    Raises:
        FinetuneError: the package of the model or of the data set is not installed.
        ValueError: no such step.
    """
    from transformers import TrainerCallback

    from sparse_optim.finetune.config import FinetuneConfig
    from sparse_optim.finetune.inputs import load_base, load_inputs
    from sparse_optim.finetune.trainer_setup import make_trainer

    class Stop(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == step:
                raise _Reached

    if not 1 <= step <= RUN_STEPS:
        raise ValueError(f"step: expected 1 to {RUN_STEPS}, got {step}")
    with tempfile.TemporaryDirectory() as folder:
        config = FinetuneConfig(
            model=MODEL.lower(), dataset=dataset, output=Path(folder), method="full", cpu=True,
            batch_size=BATCH_SIZE, steps=RUN_STEPS, max_train_examples=RUN_STEPS * BATCH_SIZE,
            max_eval_examples=BATCH_SIZE, eval_every=RUN_STEPS, max_grad_norm=None,
        )  # fmt: skip
        inputs = load_inputs(config)
        loaded = load_base(config, inputs)
        trainer = make_trainer(config, inputs, loaded)
        trainer.add_callback(Stop())
        try:
            trainer.train()
        except _Reached:
            return [_rounded(param, dtype) for param in loaded.model.parameters()]
    raise RuntimeError(f"{dataset}: the training ended before step {step}")


def _rounded(param: Tensor, dtype: torch.dtype) -> Tensor:
    copy = torch.nn.Parameter(param.detach().to(dtype, copy=True))
    copy.grad = None if param.grad is None else param.grad.to(dtype, copy=True)
    return copy
