"""Run the Triton kernels against the reference, interpreted, in a process of its own.

TRITON_INTERPRET must be set before the kernels are imported, and the interpreter needs two patches
(triton_interpreter.py); neither may touch other tests. The cases are in interpreted_*.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_tools import require

require("triton")


@pytest.mark.parametrize(
    "cases",
    [
        "interpreted_operations.py", "interpreted_backward.py", "interpreted_norm.py",
        "interpreted_sampled.py", "interpreted_exchange.py", "interpreted_collect.py",
    ],
)  # fmt: skip
def test_interpreted_kernels(cases: str) -> None:
    path = Path(__file__).with_name(cases)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout
