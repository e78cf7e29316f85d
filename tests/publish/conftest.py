"""What the tests of receivers take."""

from __future__ import annotations

import pytest
import torch
from publish_cases import Run, states

VERSIONS = 5


@pytest.fixture(scope="session")
def published() -> tuple[list[bytes], list[bytes], list[dict[str, torch.Tensor]]]:
    """The increments, whole patches and weights of each version; the first is the base."""
    run = Run()
    patches, wholes, weights = [b""], [b""], [states(run.net)]
    for _ in range(VERSIONS):
        patches.append(run.next().to_bytes())
        wholes.append(run.publisher.whole().to_bytes())
        weights.append(states(run.net))
    return patches, wholes, weights
