"""What the docs name exists, and the loop that they show runs."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from repository import ROOT

from sparse_optim import apply_delta, load_delta

TABLE = ROOT / "docs" / "compatibility.md"


def test_the_tests_of_the_table_of_compatibility_exist():
    file, named = None, 0
    for where in re.findall(r"`([\w/.]+?\.py|\.\.\.)((?:::\w+)?)`", TABLE.read_text()):
        path, test = where
        file = ROOT / "tests" / path if path != "..." else file
        assert file is not None
        assert file.is_file(), path
        if test:
            assert f"\ndef {test.removeprefix('::')}(" in file.read_text(), where
        named += 1
    assert named > 40


class Classifier(torch.nn.Module):
    """A model whose call returns an object with a loss, as transformers' do."""

    def __init__(self):
        super().__init__()
        self.body, self.classifier = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def forward(self, inputs, labels):
        logits = self.classifier(torch.relu(self.body(inputs)))
        return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.filterwarnings("ignore:.*total_steps")
@pytest.mark.parametrize("document", ["README.md", "docs/guide.md"])
def test_the_loop_of_the_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.S)
    (loop,) = (block for block in blocks if "for batch in loader" in block)
    torch.manual_seed(0)
    model, base = Classifier(), Classifier()
    base.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    batch = {"inputs": torch.randn(16, 8), "labels": torch.randint(2, (16,))}
    names = {"model": model, "base_model": base, "loader": [batch] * 1000, "evaluate": id}
    exec(loop, names)
    apply_delta(base, load_delta("task.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor), name
