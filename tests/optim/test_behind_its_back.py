"""What other libraries and threads do to an optimizer: it works, or an error says what to do."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from op_cases import assert_same_bits
from torch import nn
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor
from training import give_grads, new_params, set_grads, snapshot

from sparse_optim import D3, IncrementalMaskedAdamW, MaskedAdamW, Repeat, Static
from sparse_optim.delta import Delta, apply_delta


def build(net: nn.Module, steps: int = 4) -> IncrementalMaskedAdamW:
    return IncrementalMaskedAdamW(
        net.named_parameters(), lr=0.1, budget=10, total_steps=steps, unmask_steps=1.0
    )


def train(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        give_grads(list(net.parameters()), "normal", torch.Generator().manual_seed(step))
        optimizer.step()


# Parameters that others write.


def test_a_delta_that_might_lack_entries_is_refused():
    """As after DDP's Join, which copies the parameters of the process that went on longest."""
    net, other = nn.Linear(6, 5), nn.Linear(6, 5)
    base = copy.deepcopy(net)
    optimizer = build(net)
    train(net, optimizer, 0, 4)
    optimizer.delta()
    net.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"other code has written.*Delta\.from_models"):
        optimizer.delta()
    with pytest.raises(RuntimeError, match="other code has written"):
        copy.deepcopy(optimizer).delta()
    whole = Delta.from_models(base, net)
    apply_delta(base, whole)
    for got, expected in zip(base.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, expected)


def test_a_step_counts_each_version_up_by_one(backend):
    """The engine reckons with that and reads them once a step: more would be a foreign write."""
    params = new_params((40, 5), (30,), (7,))
    optimizer = MaskedAdamW(params, importance=D3(), selection=Static(60), backend=backend)
    for step in range(1, 4):
        give_grads(params, "normal", torch.Generator().manual_seed(step))
        params[2].grad = None
        before = [param._version for param in params]
        optimizer.step()
        assert [param._version - 1 for param in params] == before
        assert not optimizer.engine.written_by_others
    with torch.no_grad():
        params[2].add_(1.0)
    assert optimizer.engine.written_by_others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_write_between_steps_is_remembered_until_it_is_vouched_for(dtype):
    net = nn.Linear(6, 5).to(dtype)
    optimizer = build(net)
    train(net, optimizer, 0, 2)
    best = copy.deepcopy(net.state_dict())
    train(net, optimizer, 2, 3)
    net.load_state_dict(best)
    train(net, optimizer, 3, 4)
    for change in (lambda: None, lambda: optimizer.extend(total_steps=4)):
        change()
        with pytest.raises(RuntimeError, match=r"call optimizer\.refresh\(\) first"):
            optimizer.delta()
    optimizer.refresh()
    assert optimizer.delta().num_entries == 10


@pytest.mark.parametrize("how", ["before the first step", "after a checkpoint"])
def test_a_model_loaded_before_its_first_step_is_the_base(how):
    net = nn.Linear(6, 5)
    optimizer = build(net)
    if how == "after a checkpoint":
        train(net, optimizer, 0, 2)
        state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        optimizer = build(net)
        optimizer.load_state_dict(state[1])
        net.load_state_dict(state[0])
    else:
        net.load_state_dict(nn.Linear(6, 5).state_dict())
    train(net, optimizer, 2, 4)
    assert optimizer.delta().num_entries > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:10].clone(),
        lambda data: torch.randn(4000, 3),
        lambda data: data.to(torch.bfloat16),
        lambda data: data.t().contiguous().t(),
    ],
    ids=["smaller", "larger", "cast", "strides"],
)
def test_dense_parameters_that_no_longer_fit_their_moments_are_named(change):
    """The fused kernel wrote beyond the tensor, or read beyond its moments."""
    (body,), (head,) = new_params((50,)), new_params((40, 3))
    optimizer = MaskedAdamW(
        [{"params": [("body", body)]}, {"params": [("head", head)], "unmask": "all"}],
        importance=D3(), selection=Static(5),
    )  # fmt: skip
    set_grads([body, head], 1.0)
    optimizer.step()
    before = snapshot([body])
    head.grad = None
    head.data = change(head.data)
    set_grads([body, head], 1.0)
    with pytest.raises(RuntimeError, match=r"head has changed since .* from \(40, 3\)"):
        optimizer.step()
    assert_same_bits(body.detach(), before[0])


def test_dense_moments_of_another_layout_load():
    """Strides differ between a contiguous and a channels_last model; the entries are the same."""
    (plain,), (last,) = new_params((4, 3, 2, 2)), new_params((4, 3, 2, 2))
    last.data = last.data.contiguous(memory_format=torch.channels_last)
    optimizers = [
        MaskedAdamW([{"params": [p], "unmask": "all"}], importance=D3(), selection=Static(1))
        for p in (plain, last)
    ]
    give_grads([plain], "normal", torch.Generator().manual_seed(0))
    optimizers[0].step()
    last.data.copy_(plain.data)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for step in range(2):
        give_grads([plain], "normal", torch.Generator().manual_seed(step))
        last.grad = plain.grad.contiguous(memory_format=torch.channels_last)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain, last)


# Parameters that cannot be optimized entry by entry.


@pytest.mark.parametrize("mode", ["rank", "all"])
def test_tensors_of_several_parts_are_refused_by_what_they_are(mode):
    """torchao's quantized weights have no address: they "shared memory"."""
    parts = [Parameter(TwoTensor(torch.ones(4), torch.ones(4))) for _ in range(2)]
    plain = new_params((5,))
    groups = [{"params": plain}, {"params": parts, "unmask": mode}]
    with pytest.raises(TypeError, match=r"is a TwoTensor \(quantized by torchao.*unmask='none'"):
        IncrementalMaskedAdamW(groups, budget=2, total_steps=2, unmask_steps=1.0)
    groups[1]["unmask"] = "none"
    optimizer = IncrementalMaskedAdamW(groups, budget=2, total_steps=2, unmask_steps=1.0)
    set_grads(plain, 1.0)
    optimizer.step()


class FlatParameter(Parameter):
    """The name of FSDP's."""


def test_flat_parameters_are_refused():
    with pytest.raises(TypeError, match="flat parameter of FSDP"):
        IncrementalMaskedAdamW(
            [FlatParameter(torch.ones(4))], budget=2, total_steps=2, unmask_steps=1.0
        )


@pytest.mark.parametrize("first", ["rank", "none"])
def test_a_frozen_parameter_that_shares_memory_is_refused(first):
    """It moved with the ranked one."""
    memory = torch.randn(10)
    one, two = Parameter(memory[:6]), Parameter(memory[4:])
    modes = ["rank", "none"] if first == "rank" else ["none", "rank"]
    groups = [
        {"params": [("one", one)], "unmask": modes[0]},
        {"params": [("two", two)], "unmask": modes[1]},
    ]
    with pytest.raises(ValueError, match="one and two share memory"):
        IncrementalMaskedAdamW(groups, budget=4, total_steps=2, unmask_steps=1.0)
    for group in groups:
        group["unmask"] = "none"
    spare = {"params": [("spare", new_params((8,))[0])]}
    IncrementalMaskedAdamW([*groups, spare], budget=4, total_steps=2, unmask_steps=1.0)


@pytest.mark.parametrize("mode", ["rank", "all", "none"])
def test_empty_parameters_of_any_strides(mode):
    empty = [
        Parameter(torch.empty(1, 0).expand(5, 0)),
        Parameter(torch.as_strided(torch.empty(1), (0, 3), (0, 0))),
    ]
    plain = new_params((8,))
    optimizer = IncrementalMaskedAdamW(
        [{"params": plain}, {"params": empty, "unmask": mode}],
        budget=4,
        total_steps=1,
        unmask_steps=1.0,
    )
    set_grads([*plain, *empty], 1.0)
    optimizer.step()
    assert optimizer.metrics()["active"] == 4


def test_layers_may_be_unfrozen_later():
    """A share of the budget counts all entries where none requires a gradient yet."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    optimizer = IncrementalMaskedAdamW(
        net.named_parameters(), budget=0.5, total_steps=4, unmask_steps=1.0
    )
    assert optimizer.metrics()["budget"] == 20
    for layer in (net[1], net[0]):
        layer.requires_grad_(True)
        for _ in range(2):
            net(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.metrics()["active"] == 20


# Other ways to call it.


def test_sharding_by_zero_is_refused(tmp_path):
    """Each process would spend the whole budget on its own parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, of torch.jit
        from torch.distributed.optim import ZeroRedundancyOptimizer
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        with pytest.raises(TypeError, match="ZeroRedundancyOptimizer gives each process a share"):
            ZeroRedundancyOptimizer(
                new_params((50,)), IncrementalMaskedAdamW, budget=5, total_steps=2
            )
    finally:
        torch.distributed.destroy_process_group()


def test_a_step_while_another_thread_steps_is_refused():
    """The active set would be corrupted."""
    params = new_params((50,))
    inside, done = threading.Event(), threading.Event()

    def slow(name, param, grad):
        inside.set()
        done.wait(30)
        return grad.abs()

    optimizer = MaskedAdamW(params, importance=slow, selection=Static(5))
    set_grads(params, 1.0)
    thread = threading.Thread(target=optimizer.step)
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(RuntimeError, match="running in another thread"):
            optimizer.step()
    finally:
        done.set()
        thread.join()
    assert optimizer.metrics()["step"] == 1
    optimizer.step()
    assert copy.deepcopy(optimizer).step() is None
    assert optimizer.metrics()["step"] == 2


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_step_is_the_step(fullgraph):
    """It ran into the limit of recompilations, and was slower than the step. With fullgraph=True
    torch says that it cannot be traced."""
    torch.compiler.reset()
    net, twin = nn.Linear(6, 5), nn.Linear(6, 5)
    twin.load_state_dict(net.state_dict())
    optimizer, straight = build(net, steps=12), build(twin, steps=12)
    train(twin, straight, 0, 12)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=fullgraph)
    for number in range(12):
        give_grads(list(net.parameters()), "normal", torch.Generator().manual_seed(number))
        if not fullgraph:
            step()
            continue
        with pytest.raises(Exception, match=r"Avoid calling the function .MaskedAdamW\.step"):
            step()
        return
    for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same_bits(got.detach(), expected.detach())


def test_metrics_are_numbers():
    """Lightning's log_dict takes nothing else."""
    optimizer = build(nn.Linear(3, 4))
    assert all(isinstance(value, (int, float)) for value in optimizer.metrics().values())


@pytest.mark.parametrize(
    ("steps", "taken", "told"),
    [(4, 4, False), (40, 4, True), (2, 4, True), (40, 0, False)],
    ids=["fits", "too long", "too short", "no step"],
)
def test_a_schedule_for_another_number_of_steps_is_mentioned_once(steps, taken, told, caplog):
    net = nn.Linear(6, 5)
    optimizer = build(net, steps)
    train(net, optimizer, 0, taken)
    optimizer.delta()
    optimizer.delta()
    expected = f"total_steps is {steps}, but {taken} steps were taken"
    assert [expected in message for message in caplog.messages] == [True] * told


@pytest.mark.parametrize("selection", [Static(5), Repeat(5)])
def test_selections_without_a_schedule_have_nothing_to_mention(selection, caplog):
    net = nn.Linear(6, 5)
    optimizer = MaskedAdamW(net.named_parameters(), importance=D3(), selection=selection)
    train(net, optimizer, 0, 3)
    optimizer.delta()
    assert not caplog.messages


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer: optimizer.extend(budget=12),
        lambda optimizer: optimizer.refresh(),
        lambda optimizer: optimizer.add_param_group({"params": [("new", new_params((9,))[0])]}),
    ],
    ids=["extend", "refresh", "add_param_group"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_after_a_change_are_not_forgotten(dtype, change):
    """The engine that took over knew no versions, and took a write before its step for its own."""
    net = nn.Linear(6, 5).to(dtype)
    optimizer = build(net)
    train(net, optimizer, 0, 2)
    change(optimizer)
    optimizer.delta()
    refuses_after_a_write(net, optimizer)


def refuses_after_a_write(net: nn.Module, optimizer: IncrementalMaskedAdamW) -> None:
    with torch.no_grad():
        net.weight.add_(1)
    train(net, optimizer, 2, 3)
    with pytest.raises(RuntimeError, match="other code has written"):
        optimizer.delta()


def test_a_checkpoint_remembers_what_others_have_written():
    net = nn.Linear(6, 5)
    optimizer = build(net)
    train(net, optimizer, 0, 2)
    refuses_after_a_write(net, optimizer)
    other = copy.deepcopy(net)
    resumed = build(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, resumed, 3, 4)
    with pytest.raises(RuntimeError, match="other code has written"):
        resumed.delta()


def test_a_copy_notices_writes_of_its_own():
    net = nn.Linear(6, 5)
    optimizer = build(net)
    train(net, optimizer, 0, 2)
    twin, second = copy.deepcopy((net, optimizer))
    assert second.delta().num_entries == 5
    refuses_after_a_write(twin, second)
    optimizer.delta()


def test_a_run_that_begins_again_has_a_base_of_its_own():
    """A checkpoint of step 0, loaded after steps on another base."""
    net = nn.Linear(6, 5)
    optimizer = build(net)
    start = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 0, 2)
    other = nn.Linear(6, 5)
    net.load_state_dict(other.state_dict())
    optimizer.load_state_dict(start)
    train(net, optimizer, 0, 4)
    apply_delta(other, optimizer.delta())
    for got, expected in zip(other.parameters(), net.parameters(), strict=True):
        assert_same_bits(got.detach(), expected.detach())


@pytest.mark.parametrize("where", ["touched.add", "clip", "update"])
def test_an_error_amid_a_step_leaves_a_replacing_selection_whole(where, monkeypatch):
    """The sets were exchanged, and `state` showed the other one: no step was possible again."""
    net, twin = nn.Linear(6, 5), nn.Linear(6, 5)
    twin.load_state_dict(net.state_dict())
    optimizers = [
        MaskedAdamW(each.named_parameters(), lr=0.1, importance=D3(), selection=Repeat(8))
        for each in (net, twin)
    ]
    for each, optimizer in zip((net, twin), optimizers, strict=True):
        train(each, optimizer, 0, 2)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    owner, _, name = where.rpartition(".")
    holder = optimizers[0].engine.touched if owner else type(optimizers[0].engine)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, fail)
        with pytest.raises(KeyboardInterrupt):
            train(net, optimizers[0], 2, 3)
    for each, optimizer in zip((net, twin), optimizers, strict=True):
        train(each, optimizer, 2, 4)
    for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same_bits(got.detach(), expected.detach())


def test_an_empty_optimizer_is_named():
    with pytest.raises(ValueError, match="no parameter: every group is empty"):
        MaskedAdamW([{"params": [], "unmask": "all"}], importance=D3(), selection=Static(1))


def test_two_parameters_of_one_name_have_no_delta():
    (one,), (two,) = new_params((50,)), new_params((50,), seed=1)
    optimizer = MaskedAdamW(
        [{"params": [("w", one)]}, {"params": [("w", two)]}], importance=D3(), selection=Static(20)
    )
    set_grads([one, two], 1.0)
    optimizer.step()
    with pytest.raises(ValueError, match="two parameters are called 'w'"):
        optimizer.delta()
    assert optimizer.delta(nn.ParameterList([one, two])).num_entries == 20
