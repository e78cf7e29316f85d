"""The tests of test_gpu.py and test_gpu_runs.py hold for the C++ backend, before a GPU ran them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")

# In tests/backends already, in greater numbers.
LEFT_OUT = "kinds_of_gradients or great_quotas or 16_bit or random_steps or sampled_sizes"


def test_gpu_tests_pass_on_the_cpu():
    command = [sys.executable, "-m", "pytest", "-q", "--dry-gpu", "-p", "no:cacheprovider"]
    tests = [str(Path(__file__).with_name(f"{name}.py")) for name in ("test_gpu", "test_gpu_runs")]
    chosen = ["-k", f"cpp and not ({LEFT_OUT})"]
    run = subprocess.run([*command, *tests, *chosen], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout
