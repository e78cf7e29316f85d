"""What "auto" asks of a backend that tests do not run where users do; which one it then takes."""

from __future__ import annotations

import logging
import re
import sys
import types
import warnings

import pytest
import torch

from sparse_optim.backends import reference
from sparse_optim.backends import registry as backends
from sparse_optim.engine import self_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_known():
    """Set up before monkeypatch, and hence ended after it has put the backends back."""
    for cached in (backends._fastest, self_check.fault):
        cached.cache_clear()
    yield
    for cached in (backends._fastest, self_check.fault):
        cached.cache_clear()
    with warnings.catch_warnings():  # as conftest.py does: what "auto" has to say, it says once
        warnings.simplefilter("ignore", RuntimeWarning)
        assert backends.resolve("auto", CPU) != "tried"


@pytest.fixture
def backend_with(monkeypatch):
    """Install a backend "tried" on the CPU: the reference, but for some operations."""

    def install(**operations):
        module = types.ModuleType("tried_backend")
        names = ("bind", "scan", "clip", "rank", "cut", "append", "update")
        for name in ("TILE", "scratch_bytes", *names):
            setattr(module, name, operations.get(name, getattr(reference, name)))
        monkeypatch.setitem(sys.modules, "tried_backend", module)
        monkeypatch.setattr(
            backends, "_BACKENDS", {"tried": ("tried_backend", "cpu"), **backends._BACKENDS}
        )

    return install


def fails(*arguments):
    raise ValueError("no such kernel\nsecond line")


def cut_with_ties_to_the_higher_index(*arguments):
    """The last of the winners gives way to the last entry that ties with the least."""
    reference.cut(*arguments)
    bound, position, offsets, *_, new_tensor, new_position, new_count, threshold, _ = arguments
    count, exp, noise = int(new_count), arguments[9], arguments[11]
    if not count or exp or noise.numel():
        return
    tied = []
    for index, grad in enumerate(bound.grads):
        flat = grad.reshape(-1).float().abs()
        flat[position[int(offsets[index]) : int(offsets[index + 1])].long()] = 0
        tied += [(index, at) for at in (flat == threshold).nonzero().view(-1).tolist()]
    pairs = list(zip(new_tensor[:count].tolist(), new_position[:count].tolist(), strict=True))
    winners = [pair for pair in pairs if pair not in tied]
    winners += tied[len(winners) - count :]
    new_tensor[:count], new_position[:count] = torch.tensor(sorted(winners)).T


def scan_with_a_norm_too_great(*arguments):
    reference.scan(*arguments)
    arguments[8].mul_(1.001)


def clip_with_a_factor_too_small(*arguments):
    reference.clip(*arguments)
    arguments[4].mul_(0.999)


def scan_that_overlooks_an_overflow(*arguments):
    reference.scan(*arguments)
    arguments[9].zero_()


def cut_with_a_wrong_threshold(*arguments):
    reference.cut(*arguments)
    arguments[16].mul_(1 + 1e-6)


def update_of_a_greater_step(*arguments):
    arguments[6][:, 0] *= 1.01  # lr
    reference.update(*arguments)
    arguments[6][:, 0] /= 1.01


def update_with_a_moment_too_small(*arguments):
    reference.update(*arguments)
    arguments[10].mul_(0.999)


def update_that_rounds_otherwise(*arguments):
    """As other backends may."""
    reference.update(*arguments)
    arguments[9].mul_(1 + 2e-7)


def update_that_moves_frozen_entries(*arguments):
    """By the last bit: those of the greatest tensor that have no place in the active set."""
    reference.update(*arguments)
    bound, position, offsets = arguments[:3]
    frozen = torch.ones(bound.params[0].numel(), dtype=torch.bool)
    frozen[position[: int(offsets[1])].long()] = False
    bound.params[0].detach().view(torch.int32)[frozen] ^= 1


FAULTS = [
    ("cut", cut_with_ties_to_the_higher_index, "it unmasks other entries.*step 2 of D3"),
    ("cut", cut_with_a_wrong_threshold, "the least importance that it unmasks differs"),
    ("cut", fails, "it raised ValueError: no such kernel$"),
    ("bind", fails, "it raised ValueError: no such kernel$"),
    ("rank", fails, "it raised ValueError: no such kernel$"),
    ("scan", scan_with_a_norm_too_great, "its gradient norm differs"),
    ("clip", clip_with_a_factor_too_small, "exp_avg is further from the reference"),
    ("scan", scan_that_overlooks_an_overflow, "it unmasks other entries.*progress.*step 3"),
    ("update", update_of_a_greater_step, "master is further from the reference"),
    ("update", update_with_a_moment_too_small, "exp_avg_sq is further from the reference"),
    ("update", update_that_moves_frozen_entries, "frozen entries have moved in step 1"),
]


@pytest.mark.parametrize(("name", "faulty", "message"), FAULTS, ids=lambda each: str(each)[:40])
def test_faults_are_found(backend_with, name, faulty, message):
    backend_with(**{name: faulty})
    fault = self_check.fault("tried", CPU)
    assert fault is not None
    assert re.search(message, fault), fault


def test_what_rounds_otherwise_passes(backend_with):
    backend_with(update=update_that_rounds_otherwise)
    assert self_check.fault("tried", CPU) is None


def test_the_cpu_backend_passes():
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    assert self_check.fault("cpp", CPU) is None


def test_the_emulated_cuda_kernels_pass(cuda_emulator, monkeypatch):
    monkeypatch.setitem(backends._BACKENDS, "emulated", ("emulated_cuda", "cpu"))
    assert self_check.fault("emulated", CPU) is None


def test_random_numbers_and_gradient_mode_stay_as_they_are(backend_with):
    backend_with()
    before = torch.get_rng_state()
    with torch.device("meta"):  # a default device of the user's
        assert self_check.fault("tried", CPU) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_auto_takes_what_passes_and_says_so(backend_with, caplog):
    backend_with()
    caplog.set_level(logging.INFO, "sparse_optim")
    for _ in range(2):
        assert backends.resolve("auto", CPU) == "tried"
    assert caplog.messages == [
        "checking backend 'tried' on cpu (Triton compiles its kernels the first time)",
        "backend 'tried' runs on cpu",
    ]


@pytest.mark.filterwarnings("ignore:no compiled sparse_optim backend")  # where none was built
def test_auto_passes_over_what_fails_and_warns_once(backend_with):
    backend_with(cut=fails)
    message = (
        r"backend 'tried' is passed over on cpu: it raised ValueError: no such kernel\. Please "
        r"report this.*backend='tried' runs it all the same"
    )
    with pytest.warns(RuntimeWarning, match=message):
        taken = backends.resolve("auto", CPU)
    assert taken in ("cpp", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", CPU) == taken


def test_a_backend_asked_for_by_name_is_not_checked(backend_with):
    backend_with(cut=fails)
    assert backends.resolve("tried", CPU) == "tried"


def test_nothing_is_checked_while_a_graph_is_captured(backend_with, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture of a CUDA graph begins"):
        self_check.fault("cuda", torch.device("cuda", 0))


def test_a_device_without_room_says_nothing_of_the_backend(backend_with, monkeypatch):
    """It is the user's to hear of, and the next optimizer asks again."""

    def no_room(*arguments):
        raise torch.OutOfMemoryError("made up")

    backend_with(scan=no_room)
    with pytest.raises(torch.OutOfMemoryError):
        backends.resolve("auto", CPU)
    backend_with()
    assert backends.resolve("auto", CPU) == "tried"
