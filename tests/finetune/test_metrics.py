"""Metrics of the command's tasks."""

import numpy as np
import pytest
from transformers import EvalPrediction

from sparse_optim.finetune.metrics import entities, entity_scores, multi_label_metrics

pytest.importorskip("transformers")

# What seqeval 1.2.2 reads and scores: entities() gave the same on 60,000 random sentences.
SEQEVAL = [
    ("O B-PER I-PER O B-LOC", [("PER", 1, 2), ("LOC", 4, 4)]),
    ("I-PER I-PER B-PER I-LOC", [("PER", 0, 1), ("PER", 2, 2), ("LOC", 3, 3)]),
    ("B-PER B-PER I-PER", [("PER", 0, 0), ("PER", 1, 2)]),
    (
        "S-PER E-PER I-PER O I-LOC E-LOC E-LOC",
        [("PER", 0, 0), ("PER", 1, 1), ("PER", 2, 2), ("LOC", 4, 5), ("LOC", 6, 6)],
    ),
    ("O B-LOC I-PER I-PER", [("LOC", 1, 1), ("PER", 2, 3)]),
    ("", []),
]


@pytest.mark.parametrize(("tags", "expected"), SEQEVAL)
def test_entities_are_those_of_the_conll_script(tags, expected):
    assert entities(tags.split()) == expected


def test_bilou_reads_as_iobes():
    assert entities(["B-PER", "L-PER", "U-PER", "U-PER"]) == [
        ("PER", 0, 1), ("PER", 2, 2), ("PER", 3, 3)
    ]  # fmt: skip


def test_scores_of_entities_equal_seqeval():
    truth = ["O B-PER I-PER O B-LOC", "B-ORG I-ORG O O O", "O O O O O"]
    guess = ["O B-PER I-PER B-LOC I-LOC", "B-ORG O I-ORG O O", "B-PER O O O O"]
    names = sorted({tag for line in truth + guess for tag in line.split()})
    ids = [np.array([[names.index(t) for t in line.split()] for line in x]) for x in (guess, truth)]
    counted = np.ones_like(ids[1], dtype=bool)
    counted[1, 3:] = counted[2, 2:] = False
    assert entity_scores(*ids, counted, names) == pytest.approx((0.2, 1 / 3, 0.25), abs=1e-15)
    nothing = np.full_like(ids[0], names.index("O"))
    assert entity_scores(nothing, ids[1], counted, names) == (0.0, 0.0, 0.0)


def test_scores_of_several_labels():
    """Three examples, two classes: 2 of 3 true decisions found, 1 false one, 1 exact set."""
    truth = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    logits = np.array([[2.0, -1.0], [3.0, -0.1], [-4.0, 0.1]])
    scores = multi_label_metrics(EvalPrediction(logits, truth), ["x", "y"])
    assert scores == pytest.approx({"f1_micro": 2 / 3, "f1_macro": 0.5, "subset_accuracy": 1 / 3})
