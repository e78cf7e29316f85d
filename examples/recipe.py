"""A recipe in torchtune's style: a loop whose parts a YAML config names by `_component_`.

    python examples/recipe.py
    python examples/recipe.py steps=300 optimizer.lr=0.001 optimizer.unmask_steps=1.0

In a recipe of your own change three places: the optimizer is given groups with names, not
`model.parameters()`, and `total_steps`; it clips by itself (`max_grad_norm`); the end saves the
delta. In place of torchtune's optimizer_in_bwd, which makes an optimizer for each parameter, set
`fuse_backward: true` (without accumulation): one optimizer shares out the budget.

Needs the extra "finetune"; MiniLM and TREC questions are built in.
"""

import importlib
import math
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
import yaml
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sparse_optim import param_groups, save_delta
from sparse_optim.finetune.builtin_data import load_builtin
from sparse_optim.finetune.models import find_model

CONFIG = """
model: minilm
steps: 80
batch_size: 16
gradient_accumulation_steps: 2
optimizer:
  _component_: sparse_optim.IncrementalMaskedAdamW
  lr: 0.0007
  budget: 0.01
  max_grad_norm: 1.0
lr_scheduler:
  _component_: torch.optim.lr_scheduler.LinearLR
  start_factor: 1.0
  end_factor: 0.0
output: example-recipe.safetensors
"""


def instantiate(config: dict[str, Any], *args: Any, **options: Any) -> Any:
    """Build what `_component_` names, as torchtune.config.instantiate does."""
    home, name = config["_component_"].rsplit(".", 1)
    given = {key: value for key, value in config.items() if key != "_component_"}
    return getattr(importlib.import_module(home), name)(*args, **given, **options)


def read_config(overrides: Sequence[str]) -> dict[str, Any]:
    """The config, with `key=value` and `part.key=value` of the command line."""
    config = yaml.safe_load(CONFIG)
    for override in overrides:
        path, value = override.split("=", 1)
        *parts, key = path.split(".")
        held = config
        for part in parts:
            held = held[part]
        held[key] = yaml.safe_load(value)
    return config


def main(argv: Sequence[str] | None = None) -> None:
    """Train by the config, and save the delta."""
    cfg = read_config(sys.argv[1:] if argv is None else argv)
    splits = load_builtin("trec6")
    labels = sorted(set(splits["train"]["label"]))
    source = find_model(cfg["model"]).location
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=len(labels))

    def collate(rows: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
        texts, answers = zip(*rows, strict=True)
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([labels.index(answer) for answer in answers])}

    rows = list(zip(splits["train"]["text"], splits["train"]["label"], strict=True))
    loader = DataLoader(rows, cfg["batch_size"], shuffle=True, collate_fn=collate)
    micro_batches = cfg["gradient_accumulation_steps"]

    groups = param_groups(model, dense="classifier")
    optimizer = instantiate(cfg["optimizer"], groups, total_steps=cfg["steps"])
    scheduler = instantiate(cfg["lr_scheduler"], optimizer, total_iters=cfg["steps"])
    model.train()
    losses = []
    for number, batch in enumerate(islice(cycle(loader), cfg["steps"] * micro_batches), 1):
        loss = model(**batch).loss / micro_batches
        loss.backward()
        losses.append(loss.item() * micro_batches)
        if number % micro_batches == 0:
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    delta = optimizer.delta(model)
    save_delta(delta, cfg["output"])
    tenth = math.ceil(len(losses) / 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(
        f"The loss went from {first:.2f} to {last:.2f} in {cfg['steps']} steps; "
        f"{cfg['output']} holds {delta.num_entries:,} entries ({delta.nbytes / 1e6:.1f} MB)."
    )


if __name__ == "__main__":
    main()
