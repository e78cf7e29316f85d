"""Pools of more than 2^32 entries: global indices and positions beyond 32 bits."""

import subprocess
import sys

import pytest

# A process of its own, so that its peak memory can be read. numpy's zeros are mapped, not written:
# untouched pages of parameters and gradients cost nothing.
RUN = """
import resource
import numpy as np
import torch
from torch.nn import Parameter
from sparse_optim import D3, MaskedAdamW, Increment

def zeros(count):
    return torch.from_numpy(np.zeros(count, np.int16)).view(torch.bfloat16)

size = 1_500_000_000
params = [Parameter(zeros(size)) for _ in range(3)]
assert sum(param.numel() for param in params) > 2**32
optimizer = MaskedAdamW(
    params, lr=0.5, weight_decay=0.0, importance=D3(), selection=Increment(6, 2), backend="cpp"
)
for param in params:
    param.grad = zeros(size)
winners = {0: (0, 2.0), 1: (1_200_000_001, 4.0), 2: (size - 1, 3.0)}
later = {0: (5, 0.5), 1: (size - 1, 1.5), 2: (7, 1.0)}
ties = {2: (size - 2, 0.5)}  # loses to tensor 0: its global index is the greater one
for chosen in (winners, later, ties):
    for index, (position, value) in chosen.items():
        params[index].grad[position] = value
optimizer.step()
found = {name: positions.tolist() for name, positions in optimizer.active_entries().items()}
assert found == {f"group0.param{i}": [position] for i, (position, _) in winners.items()}, found
optimizer.step()
found = {name: positions.tolist() for name, positions in optimizer.active_entries().items()}
wanted = {f"group0.param{i}": sorted([winners[i][0], later[i][0]]) for i in range(3)}
assert found == wanted, found
for index, (position, _) in winners.items():
    assert float(params[index].detach()[position]) == -1.0, params[index][position]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_more_than_four_billion_entries():
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    result = subprocess.run(
        [sys.executable, "-c", RUN], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    kilobytes = int(result.stdout)
    assert kilobytes < 4 * 2**20, "state and work space are not of the size of the pool"
