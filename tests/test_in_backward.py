"""fuse_backward=True: the same steps bit for bit, no gradient left, and clear refusals.

Faults planted by hand: the floor of the last step kept for the next one (test_same_bits, by a
wrong selection); squares added in the order of the hooks (test_same_bits, by the norm).
"""

from __future__ import annotations

import copy
import gc
import math
import pickle

import pytest
import torch
from op_cases import EXPS, assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_optim import (
    D3,
    IncrementalMaskedAdamW,
    Linear,
    Magnitude,
    MaskedAdamW,
    Repeat,
    Snip,
    Static,
    in_backward,
)
from sparse_optim.amp import GradScaler

CLASSES = 5


class Net(nn.Module):
    """Tied weights, a parameter used in every third step, tensors below and above a tile."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 24)
        self.rare = nn.Parameter(torch.randn(24) / 5)
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.norm = nn.LayerNorm(24)
        self.tied = nn.Linear(24, 60, bias=False)
        self.tied.weight = self.embedding.weight
        self.head = nn.Linear(60, CLASSES)
        self.to(dtype)

    def forward(self, tokens: Tensor, rare: bool = True) -> Tensor:
        hidden = self.embedding(tokens).mean(1)
        if rare:
            hidden = hidden + self.rare
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return self.head(self.tied(self.norm(hidden)))


def new_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net(dtype)


def build(net: Net, fuse: bool, **options) -> MaskedAdamW:
    """Body ranked, head dense."""
    head = list(net.head.named_parameters())
    body = [item for item in net.named_parameters() if not item[0].startswith("head")]
    options = {"budget": 300, "total_steps": 90, "lr": 0.01, "max_grad_norm": 0.5, **options}
    return IncrementalMaskedAdamW(
        [{"params": body}, {"params": head, "unmask": "all"}], fuse_backward=fuse, **options
    )


def loss_of(net: nn.Module, generator: torch.Generator, **options) -> Tensor:
    tokens = torch.randint(60, (8, 6), generator=generator)
    labels = torch.randint(CLASSES, (8,), generator=generator)
    return nn.functional.cross_entropy(net(tokens, **options).float(), labels)


def state_of(optimizer: MaskedAdamW) -> list[Tensor]:
    """All that two runs must have in common."""
    active = optimizer._active
    count = int(active.progress[1])
    names = ("position", "exp_avg", "exp_avg_sq", "unmask_step", "master")
    held = [getattr(active, name)[:count].clone() for name in names]
    work = [optimizer.grad_norm, optimizer._work.grad_factor, optimizer._work.threshold]
    params = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    return [tensor.clone() for tensor in [*held, active.offsets, active.progress, *work, *params]]


def assert_same_state(got: MaskedAdamW, expected: MaskedAdamW, step: int = 0) -> None:
    for number, pair in enumerate(zip(state_of(got), state_of(expected), strict=True)):
        assert_same_bits(*pair, what=f"step {step}, tensor {number}")


def assert_pool_is_free(optimizer: MaskedAdamW) -> None:
    assert all(param.grad is None for param in optimizer._pool)


def train_both(dtype, steps, overflows=(), **options) -> list[MaskedAdamW]:
    """Train with and without, compared after every step; overflows bring loss scaling."""
    nets = [new_net(dtype) for _ in range(2)]
    optimizers = [
        build(net, fuse, **options) for net, fuse in zip(nets, (True, False), strict=True)
    ]
    scalers = [
        GradScaler("cpu", init_scale=256.0, growth_interval=7, enabled=bool(overflows))
        for _ in nets
    ]
    for step in range(steps):
        for net, optimizer, scaler in zip(nets, optimizers, scalers, strict=True):
            loss = loss_of(net, torch.Generator().manual_seed(step), rare=step % 3 == 0)
            scaler.scale(loss * (math.inf if step in overflows else 1.0)).backward()
            if optimizer.fuse_backward:
                assert_pool_is_free(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert_same_state(*optimizers, step)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    return optimizers


@pytest.fixture
def small_batches(monkeypatch):
    """So that one step has many batches, of one tensor and of several."""
    monkeypatch.setattr(in_backward, "BATCH_BYTES", 1 << 9)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exp", EXPS)
def test_same_bits(backend, dtype, exp):
    """Beyond the unmasking, with skipped steps, and with entries of zero importance."""
    options = {"importance": D3(exp=exp, eps=1e-2), "backend": backend, "schedule": Linear()}
    fused, _ = train_both(dtype, 100, overflows=(4, 60), **options)
    metrics = fused.metrics()
    assert (metrics["step"], metrics["active"], metrics["skipped_steps"]) == (98, 300, 2)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.slow
def test_same_bits_over_hundreds_of_steps(backend):
    options = {"backend": backend, "total_steps": 280, "budget": 900}
    fused, _ = train_both(torch.float32, 300, overflows=(50,), **options)
    assert fused.metrics()["active"] == 900


@pytest.mark.usefixtures("small_batches")
def test_same_bits_with_any_exponent():
    """The reference's pow depends on where an entry stands: equality is promised of C++ only."""
    pytest.importorskip("sparse_optim.cpp", reason="the C++ extension has not been built")
    train_both(torch.float32, 30, importance=D3(exp=1.7, eps=1e-2), backend="cpp")


@pytest.mark.parametrize("clip", [math.inf, 1e-3])
def test_same_bits_with_one_batch(backend, clip):
    """Everything waits for the step; with and without clipping."""
    train_both(torch.float16, 12, backend=backend, max_grad_norm=clip)


def test_static_ranks_at_the_first_step_only(backend, monkeypatch):
    nets = [new_net(), new_net()]
    optimizers = [
        MaskedAdamW(net.parameters(), lr=0.01, importance=D3(), selection=Static(200),
                    max_grad_norm=1.0, backend=backend, fuse_backward=fuse)
        for net, fuse in zip(nets, (True, False), strict=True)
    ]  # fmt: skip
    for step in range(4):
        if step == 1:
            monkeypatch.setattr(in_backward.InBackward, "_rank", None)
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss_of(net, torch.Generator().manual_seed(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same_state(*optimizers, step)


def test_a_non_finite_gradient_of_a_frozen_entry_skips_the_step_when_nothing_is_left():
    param = nn.Parameter(torch.randn(50))
    optimizer = IncrementalMaskedAdamW(
        [param], budget=3, total_steps=1, max_grad_norm=math.inf, fuse_backward=True
    )
    (param * torch.arange(50.0)).sum().backward()
    optimizer.step()
    assert optimizer.metrics()["active"] == 3
    factors = torch.ones(50)
    factors[0] = math.nan
    before = param.detach().clone()
    (param * factors).sum().backward()
    optimizer.step()
    assert optimizer.metrics()["skipped_steps"] == 1
    assert_same_bits(param.detach(), before)


def test_gradients_are_freed_one_by_one(small_batches):
    """No more than the waiting ones, less than a batch, are alive when the next one comes."""
    net = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    optimizer = IncrementalMaskedAdamW(
        net.parameters(), budget=5, total_steps=5, max_grad_norm=1.0, fuse_backward=True
    )
    alive = []

    def note(_: Tensor) -> None:
        held = [param.grad for param in net.parameters() if param.grad is not None]
        waiting = optimizer._in_backward._waiting.values()
        alive.append(sum(grad.nbytes for grad in [*held, *waiting]))

    for param in net.parameters():
        param.register_hook(note)
    net(torch.randn(3, 40)).sum().backward()
    assert len(alive) == 12
    assert max(alive) < in_backward.BATCH_BYTES


def test_schedulers_and_closures_work_as_ever():
    net = new_net()
    optimizer = build(net, fuse=True, total_steps=6)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(net, torch.Generator().manual_seed(0))
        loss.backward()
        return loss

    losses = []
    for _ in range(6):
        losses.append(optimizer.step(closure).item())
        schedule.step()
    assert optimizer.metrics()["step"] == 6
    assert losses[-1] < losses[0]


def backward(net: nn.Module, seed: int = 0, **options) -> None:
    loss_of(net, torch.Generator().manual_seed(seed), **options).backward()


def test_a_second_gradient_is_refused_until_zero_grad():
    net, twin = new_net(), new_net()
    optimizer, ordinary = build(net, fuse=True), build(twin, fuse=False)
    backward(net)
    with pytest.raises(RuntimeError, match=r"second gradient before step\(\) or zero_grad\(\)"):
        backward(net)
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        optimizer.step()
    assert optimizer.metrics()["step"] == 0
    optimizer.zero_grad()
    for model, one in ((net, optimizer), (twin, ordinary)):
        backward(model, seed=1)
        one.step()
    assert_same_state(optimizer, ordinary)


def test_retain_graph_is_refused_as_accumulation_unless_a_step_lies_between():
    net = new_net()
    optimizer = build(net, fuse=True)
    loss = loss_of(net, torch.Generator().manual_seed(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert optimizer.metrics()["step"] == 1


def test_create_graph_works(recwarn):
    """torch warns of reference cycles between parameters and gradients; here none stay."""
    net = new_net()
    optimizer = build(net, fuse=True)
    loss_of(net, torch.Generator().manual_seed(0)).backward(create_graph=True)
    assert_pool_is_free(optimizer)
    optimizer.step()
    assert optimizer.metrics()["active"] > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Each parameter lies in one checkpoint; the result is that without."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        optimizer = build(net, fuse)
        for layer in net.layers:
            inner = layer.forward
            layer.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
        for step in range(3):
            backward(net, seed=step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)


def test_reentrant_checkpoints_that_share_a_parameter_are_refused():
    layer = nn.Linear(4, 4)
    optimizer = IncrementalMaskedAdamW(
        layer.parameters(), budget=2, total_steps=1, max_grad_norm=1.0, fuse_backward=True
    )
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="second gradient"):
        x.sum().backward()
    optimizer.zero_grad()
    assert optimizer.step() is None


def test_an_error_in_backward_leaves_what_zero_grad_discards():
    net, twin = new_net(), new_net()
    optimizer, ordinary = build(net, fuse=True), build(twin, fuse=False)

    def fail(_: Tensor) -> None:
        raise KeyError("planted")

    handle = net.layers[0].weight.register_hook(fail)
    with pytest.raises(KeyError, match="planted"):
        backward(net)
    handle.remove()
    assert optimizer._in_backward.holds_any
    optimizer.zero_grad()
    assert not optimizer._in_backward.holds_any
    for model, one in ((net, optimizer), (twin, ordinary)):
        backward(model, seed=1)
        one.step()
    assert_same_state(optimizer, ordinary)


def test_zero_grad_between_backward_and_step_discards():
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    optimizer.zero_grad(set_to_none=False)
    net.head.zero_grad()
    assert optimizer.step() is None
    assert optimizer.metrics()["step"] == 0
    backward(net)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()  # nothing came since
    assert optimizer.metrics()["step"] == 1


def test_the_models_zero_grad_does_not_discard():
    net = new_net()
    build_keeps = build(net, fuse=True)
    backward(net)
    net.zero_grad()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) discards"):
        backward(net)
    assert build_keeps.fuse_backward


def test_gradients_set_by_hand_are_taken_at_the_step(backend):
    """As are those of parameters that were unfrozen after the construction."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        net.layers[1].requires_grad_(False)
        optimizer = build(net, fuse, backend=backend)
        net.layers[1].requires_grad_(True)
        for step in range(3):
            backward(net, seed=step, rare=False)
            net.rare.grad = torch.full((24,), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)
    assert len(runs[0]._in_backward._handles) == len(runs[0]._pool)


def test_frozen_parameters_get_no_hook_and_stay():
    net = new_net()
    net.layers[1].requires_grad_(False)
    before = net.layers[1].weight.detach().clone()
    optimizer = build(net, fuse=True)
    backward(net)
    optimizer.step()
    assert_same_bits(net.layers[1].weight.detach(), before)
    assert net.layers[1].weight._post_accumulate_grad_hooks is None


def test_a_gradient_that_comes_back_after_it_was_taken_is_refused():
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    net.norm.bias.grad = torch.ones(24)
    with pytest.raises(RuntimeError, match=r"norm\.bias got a second gradient"):
        optimizer.step()


def test_switched_off_and_on_between_steps():
    net, twin = new_net(), new_net()
    optimizer, ordinary = build(net, fuse=True), build(twin, fuse=False)
    for step in range(6):
        optimizer.fuse_backward = step % 2 == 0
        for model, one in ((net, optimizer), (twin, ordinary)):
            backward(model, seed=step)
            assert (model.rare.grad is None) == one.fuse_backward
            one.step()
            one.zero_grad()
    assert_same_state(optimizer, ordinary)


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: setattr(optimizer, "fuse_backward", False),
        lambda optimizer: optimizer.extend(budget=400),
        lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
        lambda optimizer: optimizer.add_param_group(
            {"params": [("new", nn.Parameter(torch.ones(3)))]}
        ),
        copy.deepcopy,
    ],
)
def test_nothing_changes_between_backward_and_step(change):
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    with pytest.raises(RuntimeError, match="between backward"):
        change(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.metrics()["step"] == 1
    change(optimizer)
    backward(net)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_hooks_of_its_own(how):
    net = new_net()
    optimizer = build(net, fuse=True)
    backward(net)
    optimizer.step()
    optimizer.zero_grad()
    both = net, optimizer
    twin, other = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert other.fuse_backward
    for model, one in ((net, optimizer), (twin, other)):
        backward(model, seed=1)
        assert_pool_is_free(one)
        one.step()
        one.zero_grad()
    assert_same_state(other, optimizer)


def test_resume_and_extend_keep_the_hooks():
    net, twin = new_net(), new_net()
    optimizer, other = build(net, fuse=True), build(twin, fuse=True)
    for step in range(2):
        backward(net, seed=step)
        optimizer.step()
        optimizer.zero_grad()
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((net, optimizer), (twin, other)):
        one.extend(budget=500, total_steps=60)
        backward(model, seed=2)
        assert_pool_is_free(one)
        one.step()
    assert_same_state(other, optimizer)


def test_an_optimizer_that_is_gone_takes_nothing():
    net = new_net()
    optimizer = build(net, fuse=True)
    with pytest.raises(ValueError, match="another optimizer"):
        build(net, fuse=True)
    del optimizer
    gc.collect()
    backward(net)
    assert all(param.grad is not None for param in net.parameters())
    second = build(net, fuse=True)
    second.step()
    assert second.metrics()["active"] > 0


def test_a_failed_construction_leaves_no_hooks():
    """The second of two parameters is another optimizer's."""
    first, second = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    options = {"budget": 2, "total_steps": 1, "max_grad_norm": 1.0, "fuse_backward": True}
    owner = IncrementalMaskedAdamW([second], **options)
    with pytest.raises(ValueError, match="another optimizer"):
        IncrementalMaskedAdamW([first, second], **options)
    (first * 2 + second).sum().backward()
    assert first.grad is not None
    assert owner._in_backward.holds_any


def test_compiled_as_a_whole():
    """Gradients come together then: nothing is saved, nothing changes."""
    runs = []
    for fuse in (True, False):
        net = new_net()
        optimizer = build(net, fuse)
        compiled = torch.compile(net, backend="aot_eager")
        for step in range(3):
            backward(compiled, seed=step)
            optimizer.step()
            optimizer.zero_grad()
        runs.append(optimizer)
    assert_same_state(*runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance": Snip(), "selection": Static(3)}, "D3 only"),
        ({"importance": Magnitude(), "selection": Static(3)}, "D3 only"),
        ({"importance": D3(), "selection": Repeat(3)}, "only grows"),
    ],
)
def test_methods_that_need_whole_gradients_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskedAdamW(nn.Linear(3, 3).parameters(), max_grad_norm=1.0, fuse_backward=True, **options)


def test_says_that_nothing_clips():
    with pytest.warns(UserWarning, match="clip_grad_norm_ finds none and returns 0"):
        optimizer = build(new_net(), fuse=True, max_grad_norm=None)
    assert optimizer.fuse_backward


def test_sparse_gradients_are_refused_in_backward():
    layer = nn.Embedding(9, 4, sparse=True)
    optimizer = IncrementalMaskedAdamW(
        layer.parameters(), budget=2, total_steps=1, max_grad_norm=1.0, fuse_backward=True
    )
    with pytest.raises(TypeError, match="sparse=False"):
        layer(torch.tensor([1])).sum().backward()
    assert not optimizer._in_backward.holds_any


def test_several_processes_are_refused(monkeypatch):
    net = new_net()
    optimizer = build(net, fuse=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        backward(net)
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        build(new_net(), fuse=True)
    monkeypatch.undo()
    optimizer.zero_grad()
    backward(net)
    optimizer.step()


def test_ddp_of_one_process_is_refused_at_the_step():
    """Its reducer writes gradients back after ours were taken."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        net = new_net()
        optimizer = build(net, fuse=True)
        wrapped = nn.parallel.DistributedDataParallel(net)
        backward(wrapped)
        with pytest.raises(RuntimeError, match="averaged by DistributedDataParallel"):
            optimizer.step()
    finally:
        distributed.destroy_process_group()


def test_torchs_scaler_is_refused():
    net = new_net()
    optimizer = build(net, fuse=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(net, torch.Generator())).backward()
    with pytest.raises(RuntimeError, match=r"sparse_optim\.amp\.GradScaler"):
        scaler.step(optimizer)
    assert optimizer.metrics()["step"] == 0


def test_unscaling_from_outside_is_refused():
    net = new_net()
    optimizer = build(net, fuse=True)
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(net, torch.Generator())).backward()
    with pytest.raises(RuntimeError, match="unscale_ finds no gradients"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.metrics()["step"] == 1
