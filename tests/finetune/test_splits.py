"""The held-out part of train."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets", reason="the main job needs the extra 'finetune'")

from datasets import Dataset

from sparse_optim.finetune.data import DataRequest, load_data
from sparse_optim.finetune.splits import hold_out, share_out


def test_rare_classes_are_in_both_parts(tmp_path):
    """Of 5 rare examples in 501, a random tenth often has none."""
    labels = ["often"] * 493 + ["rare"] * 5 + ["twice"] * 2 + ["once"]
    path = tmp_path / "set.csv"
    path.write_text("text,label\n" + "".join(f"t{i},{x}\n" for i, x in enumerate(labels)))
    data = load_data(DataRequest(str(path), eval_fraction=0.1))
    names = data.label_names
    counts = [Counter(names[i] for i in part["label"]) for part in (data.train, data.evaluation)]
    assert counts[1] == {"often": 49, "rare": 1, "twice": 1}
    assert counts[0] == {"often": 444, "rare": 4, "twice": 1, "once": 1}
    again = load_data(DataRequest(str(path), eval_fraction=0.1))
    assert again.evaluation["text"][:] == data.evaluation["text"][:]


@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 40), min_size=1, max_size=8),
    st.floats(0.01, 0.99),
)
def test_shares_are_within_the_class_and_add_up(counts, fraction):
    total = sum(counts.values())
    size = max(1, round(total * fraction))
    quota = share_out(Counter(counts), fraction, size)
    for name, count in counts.items():
        assert quota[name] == 0 if count == 1 else 1 <= quota[name] <= count - 1
        assert count == 1 or abs(quota[name] - count * fraction) <= 1
    rounded_up = sum(count > 1 and count * fraction < 1 for count in counts.values())
    assert quota.total() <= size + rounded_up


def test_classes_of_one_example_each_are_split_at_random():
    train, held = hold_out(Dataset.from_dict({"text": ["a", "b", "c"]}), 0.3, ["x", "y", "z"])
    assert (len(train), len(held)) == (2, 1)
