"""A short run of bench.followers; `make soak` runs it with a larger model and more kills."""

from __future__ import annotations

import pytest

from bench.followers import run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_and_lied_to_all_hold_the_trainers_weights():
    found = run("tiny", steps=20, kills=2, pause=0.1)
    assert found["faults"] == []
    assert found["versions"] >= 20
    assert found["killed"] == {"folder": 2, "tcp": 2, "tcp, late": 2, "trainer": 2}
    taken = [events["took"] for events in found["events"].values()]
    assert len(taken) == 3
    assert min(taken) > 0
    assert sum(taken) > 20
    assert sum(events.get("refused", 0) for events in found["events"].values()) > 0
