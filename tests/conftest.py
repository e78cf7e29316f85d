"""What every test module relies on: repeatable Hypothesis runs, NaN in uninitialised memory."""

import os
import shutil
import warnings
from collections.abc import Generator, Iterator

import hypothesis
import pytest
from _pytest.doctest import DoctestModule
from filelock import FileLock

# Workers of pytest-xdist share the cores; so do the processes that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import torch

from sparse_optim.engine import choose

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _reference_backend_is_no_surprise() -> None:
    """Without the extension, "auto" warns once: here. Tests then run on the reference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        choose.choose("auto", torch.device("cpu"))


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Tests hold no examples: of a module that cannot be imported, --doctest-modules would make a
    skipped test here, and hide the error."""
    found = yield
    return [each for each in found if not isinstance(each, DoctestModule)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--dry-gpu", action="store_true", help="run tests marked gpu with the C++ backend instead"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    dry = item.config.getoption("--dry-gpu")
    if item.get_closest_marker("gpu") and not (dry or torch.cuda.is_available()):
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN (integers: the largest), so that reads show.

    Not on a GPU, where cuBLAS would refuse to be deterministic without an environment variable.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cuda_emulator(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The CUDA kernels, compiled for the emulator: the operations of `emulated_cuda` run."""
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++")
    import emulated_cuda

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one for all processes
        folder = folder.parent
    with FileLock(folder / "emulator.lock"):
        library = folder / emulated_cuda.LIBRARY
        if not library.exists():
            emulated_cuda.build(folder)
    emulated_cuda.load(library)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, by far where other processes want the cores, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "cpp"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the CPU; "cpp" is skipped where the extension has not been built."""
    if request.param == "cpp":
        pytest.importorskip(
            "sparse_optim.backends.cpp", reason="the C++ extension has not been built"
        )
    return request.param


# Tests marked gpu: (backend, device) of each.


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every backend that a GPU has; in a dry run those of the CPU."""
    if "target" in metafunc.fixturenames:
        dry = metafunc.config.getoption("--dry-gpu")
        names = ["cpp", "reference"] if dry else ["cuda", "triton", "reference"]
        metafunc.parametrize("target", names, indirect=True)


@pytest.fixture
def target(request: pytest.FixtureRequest) -> tuple[str, torch.device]:
    """(backend, device); the reference on the device is what runs where nothing is compiled."""
    if request.config.getoption("--dry-gpu"):
        return request.param, torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        return choose.choose(request.param, device), device
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiled(target: tuple[str, torch.device]) -> tuple[str, torch.device]:
    """Backends that never wait for the device."""
    if target[0] == "reference":
        pytest.skip("the reference backend waits for the device, as it says")
    return target


@pytest.fixture
def on_gpu(compiled: tuple[str, torch.device]) -> tuple[str, torch.device]:
    if compiled[1].type != "cuda":
        pytest.skip("a dry run: there are no streams and graphs on the CPU")
    return compiled
