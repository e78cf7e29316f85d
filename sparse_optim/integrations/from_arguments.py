"""Build the optimizer from what a Trainer is told anyway: its TrainingArguments.

    trainer = SelectiveTrainer(
        model=model, args=args, train_dataset=data,
        build_optimizer=from_arguments(args, budget=0.01, dense="classifier"),
    )

The Trainer builds the scheduler, from the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn
from transformers import TrainingArguments

from sparse_optim.integrations.trainer import BuildOptimizer
from sparse_optim.optim.id3 import IncrementalMaskedAdamW
from sparse_optim.optim.param_groups import Competes, param_groups
from sparse_optim.policy.defaults import RANK

ADAMW = ("adamw_torch", "adamw_torch_fused")


def from_arguments(
    args: TrainingArguments,
    *,
    budget: int | float,
    rank: str | Competes = RANK,
    dense: str | Sequence[str] = (),
    unmask_steps: int | float | None = None,
    every: int | None = None,
    sampled_backward: bool = False,
) -> BuildOptimizer:
    """A `build_optimizer` for `SelectiveTrainer` that takes its settings from the arguments.

    Learning rate, betas, eps, weight decay (without biases and norms) and clipping are those of
    `args`; `max_grad_norm=0` does not clip. `total_steps` is the length of the run. Set
    `learning_rate`: ID3 wants about ten times the rate of full fine-tuning, and the default of
    `TrainingArguments` is 5e-5.

    Args:
        args: the arguments that the trainer gets.
        budget: entries that may ever be active (int), or share of those that compete (float).
        rank: which parameters compete for the budget; see `param_groups`. By default neither
            embeddings nor a language model's output layer do; "all" lets them.
        dense: beginnings of names of parameters to train whole, outside the budget: a fresh head.
            `from_pretrained(..., output_loading_info=True)` lists them as "missing_keys".
        unmask_steps, every, sampled_backward: as in `IncrementalMaskedAdamW`.

    Raises:
        ValueError: `args` ask for another optimizer than AdamW.

    When the trainer builds the optimizer, `param_groups` and `IncrementalMaskedAdamW` check the
    other arguments.
    """
    if args.optim not in ADAMW or args.optim_args:
        raise ValueError(
            f"optim={str(args.optim)!r}, optim_args={args.optim_args!r}: the optimizer takes the "
            "steps of AdamW: leave both at their defaults"
        )

    def build(model: nn.Module, total_steps: int) -> IncrementalMaskedAdamW:
        return IncrementalMaskedAdamW(
            param_groups(model, rank=rank, dense=dense, weight_decay=args.weight_decay),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            budget=budget,
            total_steps=total_steps,
            unmask_steps=unmask_steps,
            every=every,
            max_grad_norm=args.max_grad_norm or math.inf,
            model=model,
            sampled_backward=sampled_backward,
        )

    return build
