"""Which backend runs, and that a slow one is never a silent surprise."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from gpu_tools import require
from torch.nn import Parameter

from sparse_optim import D3, MaskedAdamW, Static
from sparse_optim.backends import reference
from sparse_optim.backends.registry import load
from sparse_optim.engine import choose

CPU = torch.device("cpu")


def build(backend: str) -> MaskedAdamW:
    return MaskedAdamW(
        [Parameter(torch.zeros(4))], importance=D3(), selection=Static(1), backend=backend
    )


def test_the_optimizer_says_which_backend_runs(backend):
    optimizer = build(backend)
    assert optimizer.backend == backend
    assert optimizer.engine.ops is load(backend)


def test_auto_takes_the_compiled_backend():
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    assert build("auto").backend == "cpp"


def test_unknown_backends_are_refused():
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*got 'fast'"):
        choose.choose("fast", CPU)


def test_a_backend_of_another_device_is_refused():
    with pytest.raises(ValueError, match="'cpp' runs on cpu, but the parameters are on meta"):
        choose.choose("cpp", torch.device("meta"))


@pytest.mark.parametrize("backend", ["cpp", "emulated", "triton"])
def test_every_backend_has_the_signatures_of_the_reference(backend):
    """Arguments of the same names in the same order: backends are interchangeable modules."""
    if backend == "triton":
        require("triton")
    if backend == "cpp":
        pytest.importorskip("sparse_optim._C", reason="the C++ extension has not been built")
    modules = {"cpp": "sparse_optim.backends.cpp", "triton": "sparse_optim.triton_kernels"}
    module = importlib.import_module(modules.get(backend, "emulated_cuda"))
    assert module.TILE >= 1
    for name in ("scan", "rank", "cut", "append", "update"):
        expected = list(inspect.signature(getattr(reference, name)).parameters)
        assert list(inspect.signature(getattr(module, name)).parameters) == expected
        assert len(expected) <= 8


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["sparse_optim._C"] = None  # import raises ImportError, as where nothing was built
import torch
from torch.nn import Parameter
from sparse_optim import D3, MaskedAdamW, Static

def build(backend="auto"):
    params = [Parameter(torch.ones(9))]
    return MaskedAdamW(params, importance=D3(), selection=Static(2), backend=backend)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = build(), build()
assert first.backend == second.backend == "reference", first.backend
messages = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
assert len(messages) == 1, messages
assert "no compiled sparse_optim backend is taken for cpu" in messages[0], messages
first.engine.pool.params[0].grad = torch.arange(9.0)
first.step()
assert first.active_entries()["group0.param0"].tolist() == [7, 8]
try:
    build("cpp")
except RuntimeError as error:
    assert "backend 'cpp' is not installed" in str(error), error
else:
    raise SystemExit("backend='cpp' was accepted without the extension")
print("as promised")
"""


def test_without_the_extension_the_reference_runs_and_warns_once():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, check=False
    )
    assert result.stdout == "as promised\n", result.stderr
