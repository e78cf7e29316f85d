"""sampled_backward=True over whole runs: what a dense run with norm="active" does.

That these tests can fail: faults that were planted by hand, and a test that saw each.

    leaf of an earlier set kept                       test_a_run_is_that_of_dense_gradients
    dense part not gathered, or written over          test_a_weight_that_is_also_used_functionally
    active gradients of the step before kept          test_a_run_is_that_of_dense_gradients
    gradients not consumed                            test_a_weight_that_is_also_used_functionally
    stamp not checked                                 test_backward_of_a_forward_pass_before_the_...
    sets without data not taken at first              test_sets_without_data_never_see_a_dense_...
    norm of what moves not taken                      test_a_run_is_that_of_dense_gradients
    a loud step unmasks for itself alone              test_non_finite_gradients_skip_quiet_and_...
    row of the padding not left out                   test_importances_and_static_sets
    model.zero_grad() discards nothing                test_zero_grad_discards
    second gradient with backward hooks not refused   test_a_second_backward
    completion known before its lag                   test_every.py
    cast of the weight left to autocast               test_sampled_layers.py
    column-major inputs multiplied as others          test_sampled_layers.py
"""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from op_cases import assert_same_bits
from sampled_nets import Block, go_quiet, loss_of, new_model, optimizer_of, train
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW, Repeat, Static
from sparse_optim.amp import GradScaler
from sparse_optim.delta import apply_delta
from sparse_optim.policy.importance import D3, Magnitude, Random


def assert_close_runs(got: MaskedAdamW, want: MaskedAdamW, exact_set: bool = True) -> None:
    """The same counts, nearly the same parameters and norm."""
    fields = ("step", "active", "skipped_steps")
    assert [got.metrics()[name] for name in fields] == [want.metrics()[name] for name in fields]
    torch.testing.assert_close(got.grad_norm, want.grad_norm, rtol=1e-4, atol=1e-6)
    if exact_set:
        assert got.active_entries().keys() == want.active_entries().keys()
        for a, b in zip(got.active_entries().values(), want.active_entries().values(), strict=True):
            assert_same_bits(a, b)
    pairs = zip(got.param_groups, want.param_groups, strict=True)
    for a, b in ((a, b) for x, y in pairs for a, b in zip(x["params"], y["params"], strict=True)):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)


def both(build: Callable[[], nn.Module] = Block, **options) -> list[tuple[nn.Module, MaskedAdamW]]:
    """A sampled run and the dense one that it must be like."""
    fuse = options.pop("fuse_backward", False)
    runs = []
    for sampled in (True, False):
        model = new_model(build)
        optimizer = optimizer_of(model, sampled, **options)
        if sampled:
            optimizer.fuse_backward = fuse
        runs.append((model, optimizer))
    return runs


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("every", [1, 3, 4, 16])
def test_a_run_is_that_of_dense_gradients(every, fuse):
    runs = both(every=every, fuse_backward=fuse)
    for step in range(18):
        for model, optimizer in runs:
            train(model, optimizer, 1, first=step)
        assert_close_runs(runs[0][1], runs[1][1])
    assert runs[0][1].metrics()["active"] == 200


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", [D3(exp=2.0, eps=0.1), Magnitude(), Random(3)], ids=str)
def test_importances_and_static_sets(kind, backend):
    """Static sets are quiet from the second step on, on the CPU."""
    runs = []
    for sampled in (True, False):
        model = new_model()
        optimizer = MaskedAdamW(
            model.parameters(), lr=0.01, importance=kind, selection=Static(150), norm="active",
            max_grad_norm=1.0, backend=backend, model=model, sampled_backward=sampled,
        )  # fmt: skip
        train(model, optimizer, 1)
        assert not optimizer.engine.loud
        train(model, optimizer, 6, first=1)
        runs.append(optimizer)
    assert_close_runs(*runs)
    assert runs[0].metrics()["active"] == 150


@pytest.mark.parametrize("importance", [Magnitude(), Random(1)], ids=str)
def test_sets_without_data_never_see_a_dense_gradient(importance):
    """They are taken before the first forward pass that trains, of the weights as they are then."""
    model = new_model()
    optimizer = MaskedAdamW(
        model.parameters(), importance=importance, selection=Static(99), max_grad_norm=1.0,
        model=model, sampled_backward=True,
    )  # fmt: skip
    model.load_state_dict(new_model(lambda: Block().apply(_shift)).state_dict())
    with torch.no_grad():
        model(torch.ones(2, 3, dtype=torch.int64))
    assert optimizer.metrics()["active"] == 0
    large = []
    for param in (model.up.weight, model.down.weight, model.words.weight):
        param.register_post_accumulate_grad_hook(lambda param: large.append(param.grad))
    train(model, optimizer, 3)
    assert large == [None] * 9  # autograd calls hooks without a gradient too
    assert optimizer.metrics()["active"] == 99
    assert set(optimizer.engine.active.unmask_step[:99].tolist()) == {1}
    dense = MaskedAdamW(
        new_model(lambda: Block().apply(_shift)).parameters(), importance=importance,
        selection=Static(99),
    )  # fmt: skip
    for param in dense.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    dense.step()
    for got, want in zip(
        optimizer.active_entries().values(), dense.active_entries().values(), strict=True
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize("skipped", [0, 2])
def test_such_a_set_is_saved_before_the_first_step(skipped):
    """After a forward pass, or after steps that infinities skipped: nothing was applied yet."""
    found = []
    for resumed in (False, True):
        model = new_model()

        def build(model: nn.Module = model) -> MaskedAdamW:
            return MaskedAdamW(
                model.parameters(), lr=0.01, importance=Random(1), selection=Static(99),
                max_grad_norm=1.0, model=model, sampled_backward=True,
            )  # fmt: skip

        optimizer = build()
        for step in range(skipped):
            (loss_of(model, step) * math.inf).backward()
            optimizer.step()
        loss_of(model, 9)
        assert optimizer.metrics()["active"] == 99
        if resumed:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer.sampled_backward = False
            optimizer = build()
            optimizer.load_state_dict(state)
        train(model, optimizer, 3)
        assert optimizer.metrics()["skipped_steps"] == skipped
        found.append([param.detach() for param in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


def _shift(module: nn.Module) -> None:
    for param in module.parameters(recurse=False):
        param.data.add_(0.25)


def test_loud_steps_are_those_of_dense_gradients_bit_for_bit():
    """On the same gradients: the first step, and each step of `every=1` before completion."""
    runs = both(every=1)
    for step in range(11):
        for model, optimizer in runs:
            train(model, optimizer, 1, first=step)
    for a, b in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_accumulation_over_micro_batches():
    runs = both()
    for model, optimizer in runs:
        train(model, optimizer, 9, micro_batches=3)
    assert_close_runs(runs[0][1], runs[1][1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Recomputed(Block):
        def forward(self, ids):
            hidden = self.words(ids)
            for _ in range(2):
                step = lambda x: torch.tanh(self.down(torch.tanh(self.up(x))))  # noqa: E731
                hidden = hidden + checkpoint(step, hidden, use_reentrant=reentrant)
            return self.head(self.out(self.norm(hidden)).mean(1))

    runs = both(Recomputed)
    for run in runs:
        train(*run, 7)
    assert_close_runs(runs[0][1], runs[1][1])


def test_a_weight_that_is_also_used_functionally():
    """One parameter gets a sampled and a dense part in one backward pass."""

    class Mixed(Block):
        def forward(self, ids):
            hidden = torch.tanh(self.up(self.words(ids)))
            hidden = nn.functional.linear(hidden, self.up.weight.t())
            return self.head(self.out(self.norm(hidden)).mean(1))

    results = []
    for fuse in (False, True, None):
        model = new_model(Mixed)
        optimizer = optimizer_of(model, sampled=fuse is not None)
        optimizer.fuse_backward = bool(fuse)
        train(model, optimizer, 2)
        loss_of(model, 7).backward()
        if fuse is not None:
            assert (model.up.weight.grad is None) is fuse
        optimizer.step()
        if fuse is not None:
            assert model.up.weight.grad is None
        results.append(optimizer)
    assert_close_runs(results[0], results[2])
    assert_close_runs(results[1], results[2])


class Attention(nn.Module):
    """in_proj_weight has no layer of its own, out_proj one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        hidden = self.words(ids)
        return self.head(self.attention(hidden, hidden, hidden)[0].mean(1))


def test_weights_without_a_layer_keep_dense_gradients():
    runs = both(Attention)
    for run in runs:
        train(*run, 9)
    assert_close_runs(runs[0][1], runs[1][1])


def test_non_finite_gradients_skip_quiet_and_loud_steps():
    """Quiet steps test what they read; a skipped loud call is made up for at the next."""
    runs = both(every=2)
    for model, optimizer in runs:
        active = []
        for step in range(8):
            loss = loss_of(model, step)
            (loss * (math.inf if step in (2, 5) else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
            active.append(optimizer.metrics()["active"])
        assert optimizer.metrics()["skipped_steps"] == 2
        assert optimizer.engine.calls == 8
        assert active == [33, 33, 33, 33, 83, 83, 100, 100]
    assert_close_runs(runs[0][1], runs[1][1])


def test_an_infinite_frozen_gradient_skips_loud_steps_alone():
    """With norm="active", dense or sampled, a quiet step does not read it."""
    for sampled in (True, False):
        model = new_model()
        optimizer = optimizer_of(model, sampled)
        for step in range(5):
            loss_of(model, step).backward()
            frozen = 3
            assert frozen not in optimizer.active_entries()["norm.bias"]
            model.norm.bias.grad[frozen] = math.inf
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.metrics()["skipped_steps"] == 2  # calls 1 and 5
        assert optimizer.metrics()["step"] == 3


# What is consumed, and what is lost.


@pytest.mark.parametrize("fuse", [False, True])
def test_a_step_consumes_the_gradients(fuse):
    model = new_model()
    optimizer = optimizer_of(model, True, fuse_backward=fuse)
    for step in range(6):
        loss_of(model, step).backward()
        assert optimizer.holds_gradients
        optimizer.step()
        assert not optimizer.holds_gradients
        assert all(param.grad is None for param in model.parameters())
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(RuntimeError, match="no gradient has come since the last step"):
            optimizer.step()
        for name, value in model.state_dict().items():
            assert_same_bits(value, before[name])
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert optimizer.metrics()["step"] == 6


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_zero_grad_discards(whose, set_to_none):
    runs = both()
    for model, optimizer in runs:
        train(model, optimizer, 2)
        loss_of(model, 50).backward()
        (optimizer if whose == "optimizer" else model).zero_grad(set_to_none)
        train(model, optimizer, 4, first=2)
    assert_close_runs(runs[0][1], runs[1][1])


@pytest.mark.parametrize("fuse", [False, True])
def test_a_second_backward(fuse):
    """Without fuse_backward gradients add up; with it the second one raises, on quiet steps too."""
    model = new_model()
    optimizer = optimizer_of(model, True, fuse_backward=fuse)
    go_quiet(model, optimizer)
    loss_of(model, 1).backward()
    if not fuse:
        loss_of(model, 2).backward()
        return
    with pytest.raises(RuntimeError, match="second gradient before step"):
        loss_of(model, 2).backward()
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 1)


def test_a_second_backward_through_sampled_weights_alone():
    """With fuse_backward, where no other gradient says so."""
    layer = nn.Linear(8, 8, bias=False)
    optimizer = IncrementalMaskedAdamW(
        layer.parameters(), budget=9, total_steps=9, every=3, max_grad_norm=1.0, model=layer,
        sampled_backward=True, fuse_backward=True, unmask_steps=1.0,
    )  # fmt: skip
    for _ in range(2):
        layer(torch.randn(3, 8)).sum().backward()
        optimizer.step()
    layer(torch.randn(3, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="second gradient before step"):
        layer(torch.randn(3, 8)).sum().backward()
    with pytest.raises(RuntimeError, match="cannot be accumulated"):
        optimizer.step()


def test_backward_of_a_forward_pass_before_the_step():
    """From quiet to loud and to another set it raises; between quiet steps it is as in torch."""
    model = new_model()
    optimizer = optimizer_of(model, True, every=2, lr=0.0, weight_decay=0.0)
    go_quiet(model, optimizer)
    stale = model.words(torch.ones(2, 3, dtype=torch.int64)).sum()
    train(model, optimizer, 1, first=1)  # now loud
    with pytest.raises(RuntimeError, match=r"backward\(\) after step\(\)"):
        stale.backward()
    stale = model.words(torch.ones(2, 3, dtype=torch.int64)).sum()
    train(model, optimizer, 1, first=2)  # quiet, of another set: this pass was an ordinary one
    stale.backward()
    assert model.words.weight.grad.any()


def test_backward_after_the_optimizer_has_changed():
    """The gradient would go nowhere."""
    for change in (
        lambda one: one.extend(total_steps=20),
        lambda one: setattr(one, "sampled_backward", False),
        lambda one: one.load_state_dict(one.state_dict()),
    ):
        model = new_model()
        optimizer = optimizer_of(model, True)
        go_quiet(model, optimizer)
        loss = loss_of(model, 1)
        change(optimizer)
        with pytest.raises(RuntimeError, match="or after a change of the optimizer"):
            loss.backward()


def test_another_library_that_wraps_the_forward_pass_later():
    """accelerate's hooks keep the forward that they find, and call it after we have detached."""
    model = new_model()
    optimizer = optimizer_of(model, True)
    kept = model.up.forward
    model.up.forward = lambda x: kept(x)
    train(model, optimizer, 3)
    optimizer.sampled_backward = False
    loss_of(model, 5).backward()
    assert model.up.weight.grad.any()


def test_steps_that_are_left_out_do_not_count():
    """Loudness is constant between two calls of step()."""
    model = new_model()
    optimizer = optimizer_of(model, True, every=3)
    loud = []
    for step in range(6):
        for _ in range(2):
            loss_of(model, step).backward()
            loud.append(model.up.weight.grad is not None)
            optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()  # without gradients: not a call
    assert loud == [True, True, *[False] * 4] * 2


def test_dense_gradients():
    """Ordinary autograd: gradients of all entries, and second derivatives."""
    model = new_model()
    optimizer = optimizer_of(model, True)
    go_quiet(model, optimizer)
    with optimizer.dense_gradients():
        grads = torch.autograd.grad(loss_of(model, 1), model.up.weight, create_graph=True)
        product = torch.autograd.grad((grads[0] ** 2).sum(), model.up.weight)
    assert product[0].count_nonzero() > 200
    loss_of(model, 1).backward()
    assert model.up.weight.grad is None


def test_gradient_scaling():
    """Ours works and skips; torch's would find no infinities."""
    runs = both(every=2)
    for model, optimizer in runs:
        scaler = GradScaler("cpu", init_scale=1024.0)
        for step in range(6):
            loss = loss_of(model, step) * (math.inf if step == 3 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 512.0
    assert_close_runs(runs[0][1], runs[1][1])
    model, optimizer = runs[0]
    scaler.scale(loss_of(model, 9)).backward()
    with pytest.raises(RuntimeError, match="leave it out"):
        scaler.unscale_(optimizer)
    torchs = torch.amp.GradScaler("cpu")
    optimizer.zero_grad()
    torchs.scale(loss_of(model, 9)).backward()
    with pytest.raises(RuntimeError, match=r"sparse_optim\.amp\.GradScaler"):
        torchs.step(optimizer)


# Attaching and detaching.


def test_the_model_is_as_it_was():
    model = new_model()
    plain = new_model()
    optimizer = optimizer_of(model, True)
    go_quiet(model, optimizer)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    assert b"sparse_optim" not in buffer.getvalue()
    for twin in copies:
        loss_of(twin, 1).backward()
        assert twin.up.weight.grad.any()
        optimizer_of(twin, True)
    optimizer.sampled_backward = False
    assert not any({"forward", "zero_grad"} & set(vars(module)) for module in model.modules())
    loss_of(model, 1).backward()
    assert model.up.weight.grad.any()


def test_the_model_is_held_weakly_and_the_optimizers_end_detaches():
    model = new_model()
    optimizer = optimizer_of(model, True)
    go_quiet(model, optimizer)
    alive = weakref.ref(optimizer)
    gc.disable()  # it dies with its last reference, and so does the model
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    assert "forward" not in vars(model.up)
    optimizer = optimizer_of(model, True)
    held = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert held() is None
    finally:
        gc.enable()
    optimizer.sampled_backward = False
    with pytest.raises(ValueError, match="keep the model"):
        optimizer.sampled_backward = True


def test_a_second_optimizer_is_refused():
    model = new_model()
    first = optimizer_of(model, True)
    with pytest.raises(ValueError, match="another optimizer with sampled_backward=True"):
        optimizer_of(model, True)
    train(model, first, 3)
    first.sampled_backward = False
    train(model, optimizer_of(model, True), 3)


@pytest.mark.parametrize("fuse", [False, True])
def test_switched_on_and_off_between_steps(fuse):
    runs = both(fuse_backward=fuse)
    for step in range(10):
        for model, optimizer in runs:
            train(model, optimizer, 1, first=step)
        runs[0][1].sampled_backward = step % 3 != 0
    runs[0][1].fuse_backward = not fuse
    for model, optimizer in runs:
        train(model, optimizer, 3, first=10)
    assert_close_runs(runs[0][1], runs[1][1])
    model, optimizer = runs[0]
    optimizer.sampled_backward = True
    loss_of(model, 1).backward()
    optimizer.sampled_backward = True  # no change
    with pytest.raises(RuntimeError, match="would lose the gradients"):
        optimizer.sampled_backward = False


def test_layers_that_stay_dense_are_named(caplog):
    model = new_model()
    torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model.up.weight.register_hook(lambda grad: grad)
    inner = model.down.forward
    model.down.forward = lambda x: inner(x)
    optimizer = optimizer_of(model, True, every=3)
    assert (
        "layers that keep ordinary weight gradients: up (it has a weight with hooks" in caplog.text
    )
    assert ", down (it has another forward" in caplog.text
    twin = new_model()
    dense = optimizer_of(twin, False, every=3)
    train(model, optimizer, 7)
    train(twin, dense, 7)
    assert_close_runs(optimizer, dense)


def test_parametrized_layers_stay_dense(caplog):
    model = new_model()
    torch.nn.utils.parametrizations.weight_norm(model.up)
    optimizer = optimizer_of(model, True)
    train(model, optimizer, 6)
    assert optimizer.metrics()["step"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "all"}, "cannot take the norm of all"),
        ({"norm": "some"}, "norm must be 'all' or 'active'"),
        ({"model": None}, "pass model=model"),
        ({"model": nn.Linear(2, 2)}, "no Linear, Conv1D or Embedding layer"),
    ],
)
def test_refused(options, message):
    model = new_model()
    given = {"model": model, "sampled_backward": True, "max_grad_norm": 1.0, **options}
    with pytest.raises(ValueError, match=message):
        IncrementalMaskedAdamW(
            model.parameters(), budget=9, total_steps=3, **given, unmask_steps=1.0
        )
    assert "forward" not in vars(model.up)


def test_sets_that_are_replaced_are_refused():
    model = new_model()
    with pytest.raises(ValueError, match="needs a set that only grows"):
        MaskedAdamW(
            model.parameters(), importance=D3(), selection=Repeat(9), max_grad_norm=1.0,
            model=model, sampled_backward=True,
        )  # fmt: skip


def test_says_that_nothing_clips():
    model = new_model()
    with pytest.warns(UserWarning, match="clip_grad_norm_ does not find all"):
        IncrementalMaskedAdamW(
            model.parameters(),
            budget=9,
            total_steps=3,
            model=model,
            sampled_backward=True,
            unmask_steps=1.0,
        )


def test_what_nothing_would_average_is_refused_in_several_processes(monkeypatch):
    """In the forward pass, and at the step; see optim/test_replicas.py for what is averaged."""
    model = new_model()
    optimizer = optimizer_of(model, True)
    loss = loss_of(model, 1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="so that nothing would average its gradients"):
        loss_of(model, 1)
    loss.backward()
    with pytest.raises(RuntimeError, match="so that nothing would average its gradients"):
        optimizer.step()


# Changes in the middle of a run.


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_a_resumed_run_goes_on_bit_for_bit(steps):
    """The phase of `every` comes from the counts of the checkpoint."""
    model = new_model()
    optimizer = optimizer_of(model, True)
    train(model, optimizer, steps)
    twin = new_model()
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = optimizer_of(twin, True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, of in ((model, optimizer), (twin, resumed)):
        train(each, of, 9, first=steps)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


def test_extend_keeps_the_phase():
    runs = both()
    for model, optimizer in runs:
        train(model, optimizer, 6)
        optimizer.extend(budget=300, total_steps=20)
        loud = []
        for step in range(6, 20):
            loud.append(optimizer.engine.loud)
            train(model, optimizer, 1, first=step)
        assert loud == [call % 4 == 0 for call in range(6, 20)]
        assert optimizer.metrics()["active"] == 300
    assert_close_runs(runs[0][1], runs[1][1])


def test_a_group_that_joins():
    runs = both()
    for model, optimizer in runs:
        torch.manual_seed(1)
        model.extra = nn.Linear(3, 3, bias=False)
        train(model, optimizer, 3)
        optimizer.add_param_group({"params": [("extra.weight", model.extra.weight)]})
        train(model, optimizer, 6, first=3)
    assert_close_runs(runs[0][1], runs[1][1])


def test_failures_leave_it_attached():
    model = new_model()
    optimizer = optimizer_of(model, True)
    train(model, optimizer, 2)
    with pytest.raises(ValueError, match="checkpoint"):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    loss_of(model, 1).backward()
    assert model.up.weight.grad is None
    with pytest.raises(RuntimeError, match="would lose"):
        optimizer.extend(budget=250)
    optimizer.step()


def test_copies_of_the_optimizer_take_ordinary_gradients():
    """They know no model; their norm is that of the original."""
    model = new_model()
    optimizer = optimizer_of(model, True)
    train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert not twin.sampled_backward
    assert twin.norm == "active"
    for each, of in ((model, optimizer), (twin_model, twin)):
        train(each, of, 4, first=2)
    assert_close_runs(optimizer, twin)


def test_the_delta_is_the_trained_model():
    model, base = new_model(), new_model()
    optimizer = optimizer_of(model, True)
    train(model, optimizer, 9)
    apply_delta(base, optimizer.delta(model))
    for a, b in zip(model.parameters(), base.parameters(), strict=True):
        assert_same_bits(a.detach(), b.detach())


# Compiled models, and models as people have them.


class Compiled(nn.Module):
    """All kinds of gradients, in a graph that does not break."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.up, self.down, self.head = nn.Linear(16, 37), nn.Linear(37, 16), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.down(torch.tanh(self.up(self.words(ids)))).mean(1))


# dynamo itself makes an instance of every autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_two_graphs_are_compiled_in_a_run():
    """A loud and a quiet one, whatever the size of the active set."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    models = [new_model(Compiled) for _ in range(2)]
    for model, compiled in zip(models, (True, False), strict=True):
        optimizer = optimizer_of(model, True, every=16, total_steps=64)
        called = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step in range(64):
            loss_of(called, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.metrics()["active"] == 200
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b)
