"""Run where only the wheel is installed: the package trains, with its compiled backend."""

import tempfile
from pathlib import Path

import torch

import sparse_optim

assert "site-packages" in sparse_optim.__file__, sparse_optim.__file__
model = torch.nn.Linear(64, 64)
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
optimizer = sparse_optim.IncrementalMaskedAdamW(
    model.named_parameters(), lr=1e-2, budget=100, total_steps=5
)
for _ in range(5):
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
moved = sum(int((model.state_dict()[name] != before[name]).sum()) for name in before)
assert 90 <= moved <= 100, moved
assert optimizer.backend == "cpp", optimizer.backend

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "delta.safetensors"
    sparse_optim.save_delta(optimizer.delta(), path)
    base = torch.nn.Linear(64, 64)
    base.load_state_dict(before)
    sparse_optim.apply_delta(base, sparse_optim.load_delta(path))
assert all(torch.equal(base.state_dict()[name], model.state_dict()[name]) for name in before)
message = f"sparse-optim {sparse_optim.__version__}: {moved} entries moved, backend "
print(message + str(optimizer.backend))  # noqa: T201
