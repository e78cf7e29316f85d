"""Many deltas over one model: switches, outside writes, failures, threads."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from delta_cases import assert_identical, clone, example_base, example_delta, tied_pair, with_head
from interrupts import at_every_line, code_of

from sparse_optim.backends import reference, registry
from sparse_optim.delta import Delta, DeltaError, DeltaSwitcher, _exchange, _switch, merge

NAMES = ("one", "two")


@pytest.fixture(autouse=True, params=["scatter", "reference", "cpp"])
def backend(request, monkeypatch):
    """How entries are written: tensor by tensor, or by the operation `exchange`, as on a GPU."""
    if request.param == "cpp":
        pytest.importorskip("sparse_optim.backends.cpp", reason="the C++ extension is not built")
    if request.param != "scatter":
        monkeypatch.setitem(_exchange.BACKENDS, "cpu", ("not installed", request.param))
        monkeypatch.setitem(registry.BACKENDS, "not installed", ("sparse_optim.absent", None))
    return request.param


def exchanging(monkeypatch, exchange):
    """Let `exchange` take the place of the operation, which it is given first."""
    backend = SimpleNamespace(
        bind=reference.bind, exchange=lambda *args: exchange(reference.exchange, *args)
    )
    monkeypatch.setattr(_exchange, "backend_of", lambda device: backend)


@pytest.fixture
def base():
    return with_head(example_base())


@pytest.fixture
def deltas(base):
    """Two deltas; the first one replaces a whole tensor, too."""
    one, two = (example_delta(example_base(), seed=seed) for seed in (5, 6))
    return {"one": one, "two": replace(two, dense={})}


def test_each_is_in_the_model_alone(base, deltas):
    pristine, tasks = clone(base), DeltaSwitcher(base, deltas)
    assert tasks.names == NAMES
    assert_identical(base, pristine)
    for name in ("one", "two", "two", "one", None, "two"):
        tasks.use(name)
        assert tasks.active == name
        assert_identical(base, merge(deltas[name], pristine) if name else pristine)
    with pytest.raises(DeltaError, match="no delta 'unknown'"):
        tasks.use("unknown")
    assert tasks.active == "two"
    tasks.remove("two")
    assert (tasks.active, tasks.names) == (None, ("one",))
    assert_identical(base, pristine)


def test_what_does_not_fit_does_not_join(base, deltas):
    pristine, tasks = clone(base), DeltaSwitcher(base, deltas)
    wrong = dict.fromkeys(deltas["two"].fingerprints, "0" * 32)
    tasks.use("one")
    with pytest.raises(DeltaError, match="not the base"):
        tasks.add("other", replace(deltas["two"], fingerprints=wrong))
    with pytest.raises(DeltaError, match="'one' is there already"):
        tasks.add("one", deltas["two"])
    tasks.use(None)
    assert_identical(base, pristine)
    assert tasks.names == NAMES


def test_weights_tied_in_the_model_follow():
    model, tuned = tied_pair()
    delta = Delta.from_models(model, tuned)
    tasks = DeltaSwitcher(model, {"tuned": delta})
    tasks.use("tuned")
    for got, want in zip(model.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("active", ["one", None])
@pytest.mark.parametrize("whole", [False, True])
def test_writes_of_others_are_noticed(base, deltas, active, whole):
    tasks = DeltaSwitcher(base, deltas)
    tasks.use(active)
    written = next(iter(deltas["one"].dense if whole else deltas["two"].sparse))
    kept = base[written].clone()
    base[written].view(-1)[:3] += 1
    before = clone(base)
    for name in ("two", None, "one"):
        if name != active:
            with pytest.raises(DeltaError, match=f"other code has changed '{written}'"):
                tasks.use(name)
    assert tasks.active == active
    assert_identical(base, before)
    base[written].copy_(kept)  # undone: values are as they were, though versions are not
    tasks.use("two")
    assert tasks.active == "two"


def test_a_tensor_that_is_gone_is_named(base, deltas):
    tasks = DeltaSwitcher(base, deltas)
    name = min(deltas["two"].sparse)
    moved = base.pop(name)
    with pytest.raises(DeltaError, match=f"'{name}' is no longer in the model"):
        tasks.use("two")
    base[name] = moved.clone()  # another tensor with the same values, as after a move
    tasks.use("two")
    assert not torch.equal(base[name], moved)


@pytest.mark.parametrize("call", range(1, 12))
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_switch_that_fails_leaves_the_delta_in_place(base, deltas, monkeypatch, call, kind):
    pristine, tasks = clone(base), DeltaSwitcher(base, deltas)
    tasks.use("one")
    calls, scatter = 0, _switch.scatter_

    def failing(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise kind("now")
        scatter(*args)

    monkeypatch.setattr(_switch, "scatter_", failing)
    try:
        tasks.use("two")
    except kind:
        assert tasks.active == "one"
    else:
        assert call > calls
    assert_identical(base, merge(deltas[tasks.active], pristine))
    monkeypatch.undo()
    tasks.use(None)
    assert_identical(base, pristine)


CALLS = {
    "use": lambda tasks, delta: tasks.use("two"),
    "using": lambda tasks, delta: read_twice(tasks),
    "add": lambda tasks, delta: tasks.add("three", delta),
    "remove": lambda tasks, delta: tasks.remove("one"),
}


def read_twice(tasks):
    with tasks.using("two"), tasks.using("two"):
        pass


@pytest.mark.parametrize("name", CALLS)
def test_interrupts_at_every_line(base, deltas, name):
    """The model holds what `active` says, and no one waits for ever."""
    pristine = clone(base)
    wanted = {each: merge(delta, pristine) for each, delta in deltas.items()} | {None: pristine}
    model, tasks = clone(base), DeltaSwitcher(clone(base))

    def prepare():
        nonlocal model, tasks
        model = clone(pristine)
        tasks = DeltaSwitcher(model, deltas)
        tasks.use("one")
        return lambda: CALLS[name](tasks, deltas["two"])

    code = code_of(DeltaSwitcher, _switch.Task, _exchange.Exchange, _exchange._Part)
    lines = 0
    for _ended in at_every_line(code, prepare):
        lines += 1
        assert_identical(model, wanted[tasks.active])
        assert not tasks._queue
        assert not tasks._blocks
        assert not tasks._my_blocks
        for after in ("two", None):
            tasks.use(after)
            assert_identical(model, wanted[after])
    assert lines > 20


def test_threads_read_while_switches_wait(base, deltas):
    pristine, tasks = clone(base), DeltaSwitcher(base, deltas)
    wanted = {name: merge(delta, pristine) for name, delta in deltas.items()} | {None: pristine}

    def work(seed):
        for turn in range(50):
            name = (*NAMES, None)[(seed + turn) % 3]
            with tasks.using(name):
                assert_identical(base, wanted[name])
                with tasks.using(name):  # once more, by the same thread
                    tasks.use(name)
                assert_identical(base, wanted[name])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    tasks.use(None)
    assert_identical(base, pristine)


def test_a_switch_waits_for_blocks_and_goes_before_later_ones(base, deltas):
    tasks, order = DeltaSwitcher(base, deltas), []
    inside, leave = threading.Event(), threading.Event()

    def first():
        with tasks.using("one"):
            inside.set()
            leave.wait(10)
            order.append("one")

    def then(name, label):
        with tasks.using(name):
            order.append(label)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert inside.wait(10)
    for name, label in (("two", "two"), ("one", "one again")):
        threads.append(threading.Thread(target=then, args=(name, label)))
        threads[-1].start()
        while len(tasks._queue) < len(threads) - 1:
            threading.Event().wait(0.001)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["one", "two", "one again"]


def test_a_block_cannot_switch_below_itself(base, deltas):
    tasks = DeltaSwitcher(base, deltas)
    with tasks.using("one"), pytest.raises(DeltaError, match="in a block with 'one'"):
        tasks.use("two")
    for name in ("one", None):
        with tasks.using(name), pytest.raises(DeltaError, match="end it before you add 'three'"):
            tasks.add("three", deltas["two"])
        with tasks.using(name), pytest.raises(DeltaError, match="end it before you remove 'two'"):
            tasks.remove("two")
    tasks.use("two")


def test_no_delta_joins_or_goes_while_a_thread_reads(base, deltas):
    pristine, tasks = clone(base), DeltaSwitcher(base, {"one": deltas["one"]})
    names = itertools.cycle(["a", "b"])
    stop = threading.Event()

    def join_and_go():
        for _, name in zip(range(30), names, strict=False):
            tasks.add(name, deltas["two"])
            tasks.remove(name)
        stop.set()

    def read(name):
        found = 0
        while not stop.is_set():
            with tasks.using(name):
                assert_identical(base, pristine if name is None else merged)
            found += 1
        return found

    merged = merge(deltas["one"], pristine)
    with ThreadPoolExecutor(3) as threads:
        reads = [threads.submit(read, name) for name in (None, "one")]
        threads.submit(join_and_go).result(60)
        assert all(each.result(60) for each in reads)
    tasks.use(None)
    assert_identical(base, pristine)


def test_a_delta_that_goes_while_a_thread_waits_for_it(base, deltas):
    tasks = DeltaSwitcher(base, deltas)
    with ThreadPoolExecutor(2) as threads:
        with tasks.using(None):
            gone = threads.submit(tasks.remove, "two")
            while not tasks._queue:
                threading.Event().wait(0.001)
            waits = threads.submit(tasks.use, "two")
            while len(tasks._queue) < 2:
                threading.Event().wait(0.001)
        gone.result(10)
        with pytest.raises(DeltaError, match="no delta 'two'"):
            waits.result(10)
    assert tasks.active is None


def test_memory_grows_with_the_entries_alone():
    base = {"w": torch.zeros(1000, 1000)}
    tasks = DeltaSwitcher(base)
    entries = 0
    for seed in range(3):
        tuned = {"w": base["w"].clone()}
        tuned["w"].view(-1)[seed : 5000 : 7 + seed] = 1
        delta = Delta.from_models(base, tuned)
        entries += delta.num_entries
        tasks.add(str(seed), delta)
    storages = {}
    for task in tasks._tasks.values():
        held = [each for write in (*task.writes, *task.originals) for each in vars(write).values()]
        if task._exchange is not None:
            held += [each for part in task._exchange._parts for each in vars(part).values()]
        for each in held:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    assert sum(storages.values()) <= 24 * entries + 3 * 1000


def test_models_made_in_inference_mode(base, deltas):
    with torch.inference_mode():
        model = clone(base)
        tasks = DeltaSwitcher(model, deltas)
        for name in ("one", "two", None):
            tasks.use(name)
            assert_identical(model, merge(deltas[name], base) if name else base)


def test_what_is_no_delta_is_named(base):
    with pytest.raises(TypeError, match=r"'a': expected a Delta, got str; load_delta\(path\)"):
        DeltaSwitcher(base, {"a": "a.safetensors"})


def test_one_operation_writes_what_it_can(base, deltas, backend, monkeypatch):
    """All but whole tensors, and tensors that are not contiguous."""
    base["a.weight"] = base["a.weight"].t().contiguous().t()
    pristine, tasks = clone(base), DeltaSwitcher(base, deltas)
    written, scatter = [], _switch.scatter_

    def noting(tensor, *args):
        written.append(next(name for name, each in base.items() if each is tensor))
        scatter(tensor, *args)

    monkeypatch.setattr(_switch, "scatter_", noting)
    tasks.use("one")
    assert_identical(base, merge(deltas["one"], pristine))
    by_tensor = ["a.weight", "b.weight", "c.bias", "head.weight"]
    assert sorted(written) == by_tensor if backend == "scatter" else by_tensor[::3]
    versions = {name: tensor._version for name, tensor in base.items()}
    tasks.use("two")
    for name in deltas["two"].sparse:
        assert base[name]._version > versions[name]


def test_tensors_that_move_are_found_again(base, deltas):
    pristine, tasks = clone(base), DeltaSwitcher(base, deltas)
    tasks.use("one")
    for name in base:
        base[name] = base[name].clone()
    base["b.weight"] = base["b.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    tasks.use("two")
    assert_identical(base, merge(deltas["two"], pristine))
    tasks.use(None)
    assert_identical(base, pristine)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("good", range(7))
def test_an_operation_that_fails_leaves_the_delta_in_place(base, deltas, monkeypatch, good):
    pristine, calls = clone(base), 0

    def failing(exchange, *args):
        nonlocal calls
        calls += 1
        if calls == good + 1:
            raise KeyboardInterrupt
        exchange(*args)

    exchanging(monkeypatch, failing)
    tasks = DeltaSwitcher(base)

    def join_and_switch():
        for name in NAMES:
            tasks.add(name, deltas[name])
        for name in NAMES:
            tasks.use(name)

    with pytest.raises(KeyboardInterrupt):
        join_and_switch()
    active = tasks.active
    assert_identical(base, merge(deltas[active], pristine) if active else pristine)
    for name in tasks.names:
        tasks.use(name)
        assert_identical(base, merge(deltas[name], pristine))
    tasks.use(None)
    assert_identical(base, pristine)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("wrong", [1, 2])
def test_an_operation_that_does_the_wrong_thing_is_not_used(base, deltas, monkeypatch, wrong):
    """The first time, or when it should undo that."""
    pristine, calls = clone(base), 0

    def miscounting(exchange, *args):
        nonlocal calls
        calls += 1
        exchange(*args)
        if calls == wrong:
            base["b.weight"].view(-1)[deltas["one"].sparse["b.weight"].position[:2]] += 1

    exchanging(monkeypatch, miscounting)
    with pytest.warns(RuntimeWarning, match=r"entries of 'b\.weight' by one operation on cpu"):
        tasks = DeltaSwitcher(base, {"one": deltas["one"]})
    assert_identical(base, pristine)
    tasks.use("one")
    assert_identical(base, merge(deltas["one"], pristine))
    assert calls == wrong
