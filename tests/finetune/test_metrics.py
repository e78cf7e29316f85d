"""Metrics of the command's tasks."""

import numpy as np
import pytest
from transformers import EvalPrediction

from sparse_optim.finetune.metrics import (
    ROUGE,
    entities,
    entity_scores,
    multi_label_metrics,
    summary_metrics,
)

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


# Text, reference, and the F-measures of ROUGE-1, 2 and L by rouge-score 0.1.2, use_stemmer=True.
ROUGE_SCORE = [
    ("", "", (0, 0, 0)),
    ("", "the dog barked", (0, 0, 0)),
    ("the dog barked", "", (0, 0, 0)),
    ("...!?", "the dog barked", (0, 0, 0)),
    ("the dog barked", "the dog barked", (1, 1, 1)),
    ("The Dog BARKED!", "the dog, barked.", (1, 1, 1)),
    ("dogs barked at the cats", "the dog barks at a cat", (0.909091, 0.444444, 0.727273)),
    ("the the the the", "the dog and the cat", (0.444444, 0, 0.444444)),
    ("a rose is a rose is a rose", "a rose is a rose", (0.769231, 0.727273, 0.769231)),
    ("barked dog the", "the dog barked", (1, 0, 0.333333)),
    ("prices rose by 3.5% in 2019", "In 2019, prices rose 3.5 per cent", (0.8, 0.461538, 0.533333)),
    ("it costs £1,000", "it costs 1000 pounds", (0.5, 0.333333, 0.5)),
    ("state-of-the-art results", "state of the art result", (1, 1, 1)),
    ("don't panic", "do not panic", (0.333333, 0, 0.333333)),
    (
        "police say four men were arrested",
        "four men have been arrested, police said",
        (0.615385, 0.181818, 0.461538),
    ),
    (
        "the minister resigned\nafter a week of protests",
        "after protests the minister resigned",
        (0.769231, 0.363636, 0.461538),
    ),
    ("cat", "cat cat cat cat", (0.4, 0, 0.4)),
    ("Zürich café", "zurich cafe", (0, 0, 0)),
    ("under_score and tab\tspace", "under score and tab space", (1, 1, 1)),
    ("running runners ran easily", "run runner running easy", (0.5, 0.333333, 0.5)),
]


@pytest.mark.parametrize(("written", "wanted", "expected"), ROUGE_SCORE)
def test_rouge_is_that_of_the_rouge_score_package(written, wanted, expected):
    found = summary_metrics(EvalPrediction([written], [wanted]), [])
    assert [found[name] for name in ROUGE] == pytest.approx(expected, abs=1e-6)


def test_rouge_is_the_mean_over_examples():
    written, wanted, values = zip(*ROUGE_SCORE, strict=True)
    found = summary_metrics(EvalPrediction(list(written), list(wanted)), [])
    assert tuple(found.values()) == pytest.approx(np.mean(values, axis=0), abs=1e-6)
