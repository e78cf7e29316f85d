"""What "auto" asks of a backend that tests do not run where users do; which one it then takes."""

from __future__ import annotations

import logging
import re
import sys
import types
import warnings
from dataclasses import replace

import pytest
import torch

from sparse_optim.backends import reference, registry
from sparse_optim.engine import choose, self_check

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_is_known():
    """Set up before monkeypatch, and hence ended after it has put the backends back."""
    for cached in (choose._fastest, self_check.first_mismatch):
        cached.cache_clear()
    yield
    for cached in (choose._fastest, self_check.first_mismatch):
        cached.cache_clear()
    with warnings.catch_warnings():  # as conftest.py does: what "auto" has to say, it says once
        warnings.simplefilter("ignore", RuntimeWarning)
        assert choose.choose("auto", CPU) != "tried"


@pytest.fixture
def backend_with(monkeypatch):
    """Install a backend "tried" on the CPU: the reference, but for some operations."""

    def install(**operations):
        module = types.ModuleType("tried_backend")
        names = (
            "bind",
            "scan",
            "clip",
            "rank",
            "cut",
            "append",
            "update",
            "sampled_grad",
            "gather",
        )
        for name in ("TILE", "scratch_bytes", *names):
            setattr(module, name, operations.get(name, getattr(reference, name)))
        monkeypatch.setitem(sys.modules, "tried_backend", module)
        known = {"tried": ("tried_backend", "cpu"), **registry.BACKENDS}
        for owner in (registry, choose):
            monkeypatch.setattr(owner, "BACKENDS", known)

    return install


def fails(*arguments):
    raise ValueError("no such kernel\nsecond line")


def cut_with_ties_to_the_higher_index(bound, tiles, active, rule, targets, found_inf, new, scratch):
    """The last of the winners gives way to the last entry that ties with the least."""
    reference.cut(bound, tiles, active, rule, targets, found_inf, new, scratch)
    count = int(new.count)
    if not count or rule.exp or rule.noise.numel():
        return
    tied = []
    for index, grad in enumerate(bound.grads):
        flat = grad.reshape(-1).float().abs()
        flat[active.segment(index)["position"].long()] = 0
        tied += [(index, at) for at in (flat == new.threshold).nonzero().view(-1).tolist()]
    pairs = list(zip(new.tensor[:count].tolist(), new.position[:count].tolist(), strict=True))
    winners = [pair for pair in pairs if pair not in tied]
    winners += tied[len(winners) - count :]
    new.tensor[:count], new.position[:count] = torch.tensor(sorted(winners)).T


def scan_with_a_norm_too_great(bound, dense_grads, tiles, active, norms, found_inf, scratch):
    reference.scan(bound, dense_grads, tiles, active, norms, found_inf, scratch)
    norms.mul_(1.001)


def sampled_grad_without_the_last_token(input, grad_output, *arguments):
    reference.sampled_grad(input[:-1], grad_output[:-1], *arguments)


def clip_with_a_factor_too_small(*arguments):
    reference.clip(*arguments)
    arguments[4].mul_(0.999)


def scan_that_overlooks_an_overflow(bound, dense_grads, tiles, active, norms, found_inf, scratch):
    reference.scan(bound, dense_grads, tiles, active, norms, found_inf, scratch)
    found_inf.zero_()


def cut_with_a_wrong_threshold(bound, tiles, active, rule, targets, found_inf, new, scratch):
    reference.cut(bound, tiles, active, rule, targets, found_inf, new, scratch)
    new.threshold.mul_(1 + 1e-6)


def cut_with_a_root_that_rounds_otherwise(bound, tiles, active, rule, *arguments):
    reference.cut(bound, tiles, active, rule, *arguments)
    arguments[2].threshold.mul_(1 + 2e-7 * (rule.exp == 0.5))


def cut_by_another_power(bound, tiles, active, rule, *arguments):
    rule = replace(rule, exp=1.8) if rule.exp == 1.7 else rule
    reference.cut(bound, tiles, active, rule, *arguments)


def cut_with_a_power_that_rounds_otherwise(bound, tiles, active, rule, *arguments):
    """As other backends may."""
    reference.cut(bound, tiles, active, rule, *arguments)
    arguments[2].threshold.mul_(1 + 2e-7 * (rule.exp == 1.7))


def update_of_a_greater_step(bound, active, scalars, bias_correction):
    scalars.hyper[:, 0] *= 1.01  # lr
    reference.update(bound, active, scalars, bias_correction)
    scalars.hyper[:, 0] /= 1.01


def update_with_a_moment_too_small(bound, active, scalars, bias_correction):
    reference.update(bound, active, scalars, bias_correction)
    active.exp_avg_sq.mul_(0.999)


def update_that_rounds_otherwise(bound, active, scalars, bias_correction):
    """As other backends may."""
    reference.update(bound, active, scalars, bias_correction)
    active.exp_avg.mul_(1 + 2e-7)


def update_that_moves_frozen_entries(bound, active, scalars, bias_correction):
    """By the last bit: those of the largest tensor that have no place in the active set."""
    reference.update(bound, active, scalars, bias_correction)
    frozen = torch.ones(bound.params[0].numel(), dtype=torch.bool)
    frozen[active.segment(0)["position"].long()] = False
    bound.params[0].detach().view(torch.int32)[frozen] ^= 1


def gather_of_the_entry_before(bound, position, offsets, value):
    """In the last tensor."""
    shifted = position.clone()
    shifted[offsets[-2] :] = (shifted[offsets[-2] :] - 1).clamp(min=0)
    reference.gather(bound, shifted, offsets, value)


FAULTS = [
    ("cut", cut_with_ties_to_the_higher_index, "it unmasks other entries.*step 2 of D3"),
    ("cut", cut_with_a_wrong_threshold, "the least importance that it unmasks differs"),
    ("cut", cut_with_a_root_that_rounds_otherwise, r"the least importance.*exp=0\.5"),
    ("cut", cut_by_another_power, r"it unmasks other entries.*step 1 of D3\(exp=1\.7"),
    ("sampled_grad", sampled_grad_without_the_last_token, "weight gradients of active entries are"),
    (
        "gather",
        gather_of_the_entry_before,
        "it reads other values of active entries than torch",
    ),
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


@pytest.mark.parametrize(
    ("name", "faulty", "message"),
    FAULTS,
    ids=lambda each: getattr(each, "__name__", str(each)[:40]),
)
def test_faults_are_found(backend_with, name, faulty, message):
    backend_with(**{name: faulty})
    fault = self_check.first_mismatch("tried", CPU)
    assert fault is not None
    assert re.search(message, fault), fault


@pytest.mark.parametrize(
    ("name", "operation"),
    [("update", update_that_rounds_otherwise), ("cut", cut_with_a_power_that_rounds_otherwise)],
)
def test_what_rounds_otherwise_passes(backend_with, name, operation):
    backend_with(**{name: operation})
    assert self_check.first_mismatch("tried", CPU) is None


def test_the_cpu_backend_passes():
    pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension has not been built")
    assert self_check.first_mismatch("cpp", CPU) is None


def test_the_emulated_cuda_kernels_pass(cuda_emulator, monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "emulated", ("emulated_cuda", "cpu"))
    assert self_check.first_mismatch("emulated", CPU) is None


def test_random_numbers_and_gradient_mode_stay_as_they_are(backend_with):
    backend_with()
    before = torch.get_rng_state()
    with torch.device("meta"):  # a default device of the user's
        assert self_check.first_mismatch("tried", CPU) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_auto_takes_what_passes_and_says_so(backend_with, caplog):
    backend_with()
    caplog.set_level(logging.INFO, "sparse_optim")
    for _ in range(2):
        assert choose.choose("auto", CPU) == "tried"
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
        taken = choose.choose("auto", CPU)
    assert taken in ("cpp", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose.choose("auto", CPU) == taken


def test_a_backend_asked_for_by_name_is_not_checked(backend_with):
    backend_with(cut=fails)
    assert choose.choose("tried", CPU) == "tried"


def test_nothing_is_checked_while_a_graph_is_captured(backend_with, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="before the capture of a CUDA graph begins"):
        self_check.first_mismatch("cuda", torch.device("cuda", 0))


def test_a_device_without_room_says_nothing_of_the_backend(backend_with, monkeypatch):
    """It is the user's to hear of, and the next optimizer asks again."""

    def no_room(*arguments):
        raise torch.OutOfMemoryError("made up")

    backend_with(scan=no_room)
    with pytest.raises(torch.OutOfMemoryError):
        choose.choose("auto", CPU)
    backend_with()
    assert choose.choose("auto", CPU) == "tried"
