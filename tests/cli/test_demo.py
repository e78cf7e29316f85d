"""The demo, on a tiny model: three runs, one table."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="the demo needs the extra 'finetune'")

from tiny_models import save_encoder

from sparse_optim.cli import demo


def test_the_demo_compares_three_methods(tmp_path, monkeypatch, capsys):
    data = tmp_path / "set.jsonl"
    rows = [{"text": "a b" if i % 2 else "c d", "label": i % 2} for i in range(64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(demo, "MODEL", str(save_encoder(tmp_path / "model")))
    monkeypatch.setattr(demo, "DATASET", str(data))
    demo.main(tmp_path / "out", steps=3)
    results = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert list(results) == ["id3", "full", "frozen"]
    assert all(result["verified"] for result in results.values())
    id3, full, frozen = results.values()
    assert frozen["active_entries"] < id3["active_entries"] < full["active_entries"]
    assert frozen["delta_bytes"] < id3["delta_bytes"] < full["delta_bytes"]
    assert id3["state_bytes"] < full["state_bytes"]
    table = (tmp_path / "out" / "demo.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "ID3, 1%",
        "full AdamW",
        "head only",
    ]
    printed = capsys.readouterr().out
    assert "3 times: ID3, 1%, full AdamW, head only; 3 steps" in printed.partition("\n")[0]
    assert "Takes about 1 min" in printed
    assert "exact" in printed
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 1000
    for method in results:
        assert (tmp_path / "out" / method / "curves.png").stat().st_size > 1000
