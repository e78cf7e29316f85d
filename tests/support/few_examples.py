"""Built-in sets of 64 and 32 short texts, told apart by a letter.

python few_examples.py '[["NAME", "ARGUMENT", ...], ...]'     # run examples with them
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from types import ModuleType

from repository import ROOT

EXAMPLES = ROOT / "examples"


def texts(labels: list[str], count: int) -> dict[str, list[str]]:
    names = [labels[i % len(labels)] for i in range(count)]
    rows = [f"{'abcdefgh'[labels.index(name)]} {i % 10}" for i, name in enumerate(names)]
    return {"text": rows, "label": names}


def load_few(name: str) -> dict[str, dict[str, list[str]]]:
    """In place of `load_builtin`."""
    labels = ["DESC", "HUM", "LOC"] if name == "trec6" else ["negative", "positive"]
    return {"train": texts(labels, 64), "test": texts(labels, 32)}


def load_example(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    warnings.simplefilter("error")
    from sparse_optim.finetune import builtin_data

    builtin_data.load_builtin = load_few
    for port, name, *arguments in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = port
        load_example(name).main(arguments)
