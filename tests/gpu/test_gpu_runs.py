"""Whole runs of the GPU backends on a GPU, streams, graphs and devices; as tests/gpu/test_gpu.py.

Never run on a GPU so far.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from device_runs import GRADS, Run, assert_same_run, build, give, new_run, train
from op_cases import assert_same_bits

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Static
from sparse_optim.backends.registry import load
from sparse_optim.delta import _fingerprint as fingerprint
from sparse_optim.engine import self_check
from sparse_optim.optim.grad_scaler import GradScaler

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("exp", [0.0, 2.0, -0.5, 1.5])
def test_fifty_steps_equal_the_reference_on_the_cpu(target, exp):
    """Mixed dtypes, a dense group, missing gradients, an overflow, a schedule of lr."""
    assert_same_run(new_run(*target, exp=exp), new_run("reference", "cpu", exp=exp))


def test_two_runs_are_equal_bit_for_bit(compiled):
    first, second = (train(new_run(*compiled), GRADS) for _ in range(2))
    for one, other in zip(first.everything(), second.everything(), strict=True):
        assert_same_bits(one, other)


def test_resumed_in_mid_run(target):
    straight = train(new_run(*target), GRADS[:20])
    resumed = train(new_run(*target), GRADS[:8])
    saved = resumed.optimizer.state_dict()
    resumed = new_run(*target, params=resumed.params)
    resumed.optimizer.load_state_dict(saved)
    resumed.taken = 8
    train(resumed, GRADS[8:20])
    for one, other in zip(straight.everything(), resumed.everything(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_loss_scaling_with_overflows(target, kind):
    """The same scales, skips and selections as on the CPU with torch's scaler.

    torch's own takes no bfloat16 gradients on CUDA: float32 there.
    """
    results = []
    on_cpu = "reference", torch.device("cpu")
    instead = {torch.bfloat16: torch.float32} if kind is torch.amp.GradScaler else {}
    for (backend, device), scaler_of in ((target, kind), (on_cpu, torch.amp.GradScaler)):
        run = new_run(backend, device, instead=instead)
        scaler = scaler_of(device.type, init_scale=2.0**10, growth_interval=3)
        scales = []
        for step, grads in enumerate(GRADS[:12]):
            scaler.scale(torch.ones((), device=device))
            give(run, grads, scaler.get_scale(), missing=False)
            if step in (3, 4, 8):
                run.params[0].grad.view(-1)[-1] = math.inf
            scaler.step(run.optimizer)
            scaler.update()
            scales.append((scaler.get_scale(), run.optimizer.metrics()["skipped_steps"]))
        results.append((scales, run))
    assert results[0][0] == results[1][0]
    for got, want in zip(*(run.positions() for _, run in results), strict=True):
        assert torch.equal(got, want)


def test_weights_loaded_in_mid_run_are_taken_over(target):
    run = train(new_run(*target, exp=-0.5), GRADS[:3])
    twin = train(new_run("reference", "cpu", exp=-0.5), GRADS[:3])
    for each in (run, twin):
        with torch.no_grad():
            for param in each.params:
                param.mul_(-3.0)
        train(each, GRADS[3:6])
    for got, want in zip(run.positions(), twin.positions(), strict=True):
        assert torch.equal(got, want)


def test_selection_inside_the_backward_pass(target):
    """Real hooks, on the thread and stream of the backward pass; an overflow, too."""
    run = new_run(*target, exp=-0.5, fuse_backward=True)
    twin = new_run("reference", "cpu", exp=-0.5)
    for grads in GRADS[:15]:
        give(twin, grads, missing=False)
        twin.optimizer.step()
        pairs = zip(run.params, grads, strict=True)
        sum((param * grad.to(param)).float().sum() for param, grad in pairs).backward()
        assert all(param.grad is None for param in run.optimizer.engine.pool.params)
        run.optimizer.step()
        run.optimizer.zero_grad()
    for got, want in zip(run.positions(), twin.positions(), strict=True):
        assert torch.equal(got, want)
    assert run.optimizer.metrics()["skipped_steps"] == 1


def test_gradients_taken_one_by_one_where_they_were_in_the_last_step(target):
    runs = [new_run(*target, missing=False, fuse_backward=fuse) for fuse in (False, True)]
    memory = [torch.zeros_like(param) for param in runs[0].params]
    for grads in GRADS[:6]:
        for run in runs:
            for param, own, grad in zip(run.params, memory, grads, strict=True):
                param.grad = own.detach().copy_(grad)
            run.optimizer.step()
    for got, want in zip(*(run.positions() for run in runs), strict=True):
        assert torch.equal(got, want)


# Streams, graphs, devices


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_never_waits_for_the_device(on_gpu):
    run = train(new_run(*on_gpu), GRADS[:2])
    give(run, GRADS[2])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.optimizer.step()
        run.optimizer.param_groups[0]["lr"] = 0.5  # copied, without waiting
        run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.optimizer.metrics()["step"] == 4


def test_a_step_on_another_stream(on_gpu):
    side, expected = torch.cuda.Stream(), train(new_run(*on_gpu), GRADS[:10])
    run = new_run(*on_gpu)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(run, GRADS[:10])
    torch.cuda.current_stream().wait_stream(side)
    for one, other in zip(run.everything(), expected.everything(), strict=True):
        assert_same_bits(one, other)


def captured(run: Run) -> torch.cuda.CUDAGraph:
    """A graph of one step of this run, on the gradients' memory at hand."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.optimizer.step()
    return graph


def test_a_captured_step_replays_as_eager_steps_go(on_gpu):
    """Quotas, counts, an overflow, the clip and a learning rate on the device, without the host."""
    runs = []
    for _ in range(2):
        lr = torch.tensor(0.01, device=on_gpu[1])
        runs.append(new_run(*on_gpu, lr=lr, capturable=True, missing=False))
    eager, replayed = runs
    for run in runs:  # gradients stay where they are from here on
        train(run, GRADS[:2], missing=False)
    graph = captured(replayed)
    for step, grads in enumerate(GRADS[2:14]):
        for run in runs:
            give(run, grads, missing=False)
            if step == 4:
                run.params[0].grad.view(-1)[7] = math.nan
            if step == 6:
                run.optimizer.param_groups[0]["lr"].mul_(0.5)
        eager.optimizer.step()
        graph.replay()
    assert eager.optimizer.metrics()["skipped_steps"] >= 1
    for one, other in zip(replayed.everything(), eager.everything(), strict=True):
        assert_same_bits(one, other)
    # and on without the graph
    for run in runs:
        train(run, GRADS[14:16], missing=False)
    for one, other in zip(replayed.everything(), eager.everything(), strict=True):
        assert_same_bits(one, other)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # as it should be
def test_capture_is_refused_where_it_could_not_be_replayed(on_gpu):
    plain = new_run(*on_gpu)
    train(plain, GRADS[:2])
    with pytest.raises(RuntimeError, match="capturable=True"):
        captured(plain)
    torch.cuda.synchronize()
    fresh = new_run(*on_gpu, capturable=True)
    give(fresh, GRADS[0])
    with pytest.raises(RuntimeError, match="take a step before the capture"):
        captured(fresh)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="needs backend='cuda' or 'triton'"):
        new_run("reference", on_gpu[1], capturable=True)


def test_parameters_and_gradients_on_other_devices_are_refused(on_gpu):
    backend, device = on_gpu
    here, there = (torch.nn.Parameter(torch.ones(9, device=place)) for place in (device, "cpu"))
    with pytest.raises(ValueError, match=r"on several devices.*use one optimizer per device"):
        MaskedAdamW([here, there], importance=D3(), selection=Static(3))
    with pytest.raises(RuntimeError, match="device"):  # torch itself
        here.grad = torch.ones(9)
    table = torch.zeros(1, 4, dtype=torch.int64, device=device)
    with pytest.raises((RuntimeError, ValueError), match="must be on cuda"):
        load(backend).bind([torch.ones(9)], [here.detach()], table)
    with pytest.raises(ValueError, match="'cpp' runs on cpu"):
        MaskedAdamW([here], importance=D3(), selection=Static(3), backend="cpp")


def test_a_device_that_is_not_the_current_one(on_gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    assert_same_run(new_run(on_gpu[0], other), new_run("reference", "cpu"))


def test_more_than_two_to_the_32_entries(on_gpu, monkeypatch):
    """Global indices beyond 32 bits: planted winners, a tie to the lower index."""
    size, kept = 1_500_000_000, torch.cuda.mem_get_info()[0]
    if kept < 20e9:
        pytest.skip(f"needs 20 GB of free GPU memory, {kept / 1e9:.0f} are")
    params = []
    for _ in range(3):
        param = torch.nn.Parameter(torch.zeros(size, dtype=torch.bfloat16, device=on_gpu[1]))
        param.grad = torch.zeros_like(param)
        params.append(param)
    # Hashing 9 GB takes longer than all the rest.
    monkeypatch.setattr(fingerprint, "fingerprint", lambda param: "not taken")
    optimizer = IncrementalMaskedAdamW(
        params, lr=0.5, budget=6, total_steps=2, backend=on_gpu[0], unmask_steps=1.0
    )
    planted = [(0, 0, 2.0), (1, 1_200_000_001, 4.0), (2, size - 1, 3.0)]
    later = [(0, 5, 0.5), (1, size - 1, 1.5), (2, 7, 1.0), (2, size - 2, 0.5)]
    for index, position, value in itertools.chain(planted, later):
        params[index].grad[position] = value
    for expected in (planted, planted + later[:3]):
        optimizer.step()
        found = [
            (index, position)
            for index, positions in enumerate(optimizer.active_entries().values())
            for position in positions.tolist()
        ]
        assert found == sorted((index, position) for index, position, _ in expected)


def test_the_self_check_passes(target):
    """What keeps "auto" from taking this backend, in words."""
    assert self_check.first_mismatch(*target) is None


def test_auto_takes_a_backend_that_runs_here(target):
    assert build("auto", target[1]).backend in ("cpp", "cuda", "triton", "reference")
