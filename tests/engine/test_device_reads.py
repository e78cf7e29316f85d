"""The refusal of device reads refuses; and a step that waits for the device is found.

That steps of the compiled backends read nothing is shown where their kernels run: in
test_cuda_emulator.py and interpreted_triton.py.
"""

import device_reads
import pytest
import torch

from sparse_optim import IncrementalMaskedAdamW

READS = {
    "item": torch.Tensor.item,
    "bool": bool,
    "int": int,
    "tolist": lambda tensor: tensor.tolist(),
    "nonzero": torch.nonzero,
    "masked": lambda tensor: tensor[tensor > 0],
    "equal": lambda tensor: torch.equal(tensor, tensor.clone()),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_refused(name: str) -> None:
    tensor = torch.ones(1)
    with device_reads.refused(), pytest.raises(AssertionError, match="the host reads a tensor"):
        READS[name](tensor)
    READS[name](tensor)  # and allowed again


def test_a_step_that_waits_for_the_device_is_found() -> None:
    """The reference does, as it says."""
    param = torch.nn.Parameter(torch.ones(9))
    param.grad = torch.ones(9)
    optimizer = IncrementalMaskedAdamW(
        [param], budget=4, total_steps=3, backend="reference", unmask_steps=1.0
    )
    optimizer.step()
    with device_reads.refused(), pytest.raises(AssertionError, match="the host reads a tensor"):
        optimizer.step()
