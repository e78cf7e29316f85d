"""Tiny models and data sets for whole fine-tuning jobs, and short configurations of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tiny_models import SPECIAL, save_decoder, save_encoder

from sparse_optim.finetune import FinetuneConfig
from sparse_optim.finetune.checkpoints import comparable

LETTERS = "abcdefgh"
LETTER_IDS = {letter: index + len(SPECIAL) for index, letter in enumerate(LETTERS)}
END = SPECIAL.index("</s>")


def make_folders(root: Path) -> dict[str, str]:
    """A tiny encoder and decoder, and a data set for each task, under `root`."""
    found = {"encoder": save_encoder(root / "encoder"), "decoder": save_decoder(root / "decoder")}
    draw = random.Random(0)
    texts = [" ".join(draw.choices(LETTERS, k=6)) for _ in range(64)]
    rows = {
        "sequence": [{"text": t, "label": "many" if t.count("a") > 0 else "none"} for t in texts],
        "regression": [{"text": t, "label": t.count("a") / 2} for t in texts],
        "token": [
            {"tokens": t.split(), "ner_tags": ["B-A" if w == "a" else "O" for w in t.split()]}
            for t in texts
        ],
        "generation": [{"text": "a b c d " + t} for t in texts],
        "prompt": [{"prompt": t, "response": "a a a"} for t in texts],
    }
    for name, table in rows.items():
        found[name] = root / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in table))
    return {name: str(path) for name, path in found.items()}


def write_checkpoint(folder: Path, job: FinetuneConfig) -> Path:
    """What a checkpoint of a job has beside its weights and states."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"config": comparable(job), "files": {}}))
    return folder


def config(folders, output: Path, model: str, dataset: str, **settings) -> FinetuneConfig:
    defaults = {
        "rank": "all",
        "steps": 6,
        "batch_size": 8,
        "max_length": 16,
        "budget": 500,
        "cpu": True,
    }
    arguments = {**defaults, "eval_fraction": 0.25, **settings}
    return FinetuneConfig(folders[model], folders[dataset], output, **arguments)
