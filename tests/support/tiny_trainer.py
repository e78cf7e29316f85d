"""A Trainer of six steps on a language model of a few thousand entries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sparse_optim import IncrementalMaskedAdamW
from sparse_optim.integrations.trainer import SelectiveTrainer


def build_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=2, **size))


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int = 24) -> None:
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(0, 32, (count, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 0.01, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def build_optimizer(model: nn.Module, total_steps: int, **options: Any) -> IncrementalMaskedAdamW:
    return IncrementalMaskedAdamW(
        model.named_parameters(),
        lr=0.01,
        budget=200,
        total_steps=total_steps,
        **options,
        unmask_steps=1.0,
    )


def trainer_of(folder: Path, kind: type[Trainer] = SelectiveTrainer, **changes: Any) -> Trainer:
    options = {"model": build_model(), "train_dataset": Rows(), "args": arguments(folder)}
    return kind(**{**options, "build_optimizer": build_optimizer, **changes})
