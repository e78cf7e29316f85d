"""The compiled operators as torch sees them: schemas, shape functions, argument checks."""

from typing import Any

import pytest
import torch
from op_cases import DTYPES, Case, make_case

cpp = pytest.importorskip(
    "sparse_optim.backends.cpp", reason="the C++ extension has not been built"
)

OPS = ("bind", "scan", "clip", "rank", "cut", "append", "update")


def operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.sparse_optim, name).default


def arguments(name: str, case: Case) -> tuple[Any, ...]:
    """The arguments of an operator, in the order of its schema."""
    bound = [case.bound(cpp)] if names(name)[0] == "bound" else []
    return (*bound, *(case.buffer(argument) for argument in names(name)[len(bound) :]))


def before(name: str, case: Case) -> Case:
    """The case as it stands when an operation begins."""
    for previous in OPS[: OPS.index(name)]:
        operator(previous)(*arguments(previous, case))
    return case


POOLS = {
    "three tensors": {"sizes": [700, 0, 90], "num_active": 20, "dense_sizes": [9]},
    "bfloat16": {"sizes": [513], "dtypes": [torch.bfloat16], "num_active": 20},
    "missing gradient": {"sizes": [50, 60], "missing": [0], "num_active": 20, "exp": -1.0},
    "all gradients missing": {"sizes": [50, 60], "missing": [0, 1], "num_active": 20},
    "no tensors": {"sizes": [], "quota": 0},
    "no pool, dense gradients": {"sizes": [], "quota": 0, "dense_sizes": [5, 0]},
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, pool):
    case = before(name, make_case(**POOLS[pool]))
    args = arguments(name, case)
    results = torch.library.opcheck(operator(name), args)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


def test_mutation_is_declared_to_autograd():
    """Arguments that an operator writes are marked so in its schema, all others are not."""
    written = {
        name: {arg.name for arg in operator(name)._schema.arguments if arg.alias_info}
        for name in OPS
    }
    assert written == {
        "bind": {"table"},
        "scan": {"tile_max", "active_grad", "norms", "found_inf", "scratch"},
        "clip": {"grad_norm", "grad_factor"},
        "rank": {"tile_max", "scratch"},
        "cut": {"new_tensor", "new_position", "new_count", "threshold", "scratch"},
        "append": {
            "position", "exp_avg", "exp_avg_sq", "unmask_step", "master", "active_grad", "offsets",
            "progress", "scratch",
        },
        # and the parameters, whose addresses are in the table
        "update": {"exp_avg", "exp_avg_sq", "master", "progress", "arrived"},
    }  # fmt: skip


def names(name: str) -> list[str]:
    return [argument.name for argument in operator(name)._schema.arguments]


WRONG = [
    ("bind", "grads", lambda grads: [grads[0].double(), grads[1]], "grads must be float32"),
    ("bind", "grads", lambda grads: [grads[0].view(2, -1).t(), grads[1]], "grads must be contig"),
    ("bind", "params", lambda params: params[:1], "got 2 grads for 1 params"),
    ("bind", "params", lambda params: [params[0][1:], params[1]], "has 1024 entries, its param"),
    ("bind", "params", lambda params: [params[0].int(), params[1]], "params must be float32"),
    ("bind", "table", lambda table: table[:1], "table must hold 8 elements, got 4"),
    ("scan", "bound", lambda table: table[:1], "tile_offsets must hold 2 elements, got 3"),
    (
        "scan",
        "tile_offsets",
        lambda offsets: offsets + torch.tensor([0, 1, 1]),
        "tile_offsets give tensor 0 3 tiles of 512 for 1024",
    ),
    ("scan", "dense_grads", lambda grads: [grads[0].double()], "dense_grads must be float32"),
    ("scan", "position", lambda position: position.long(), "position has the wrong dtype"),
    ("scan", "offsets", lambda offsets: offsets[:-1], "offsets must hold 3 elements, got 2"),
    ("scan", "offsets", lambda offsets: offsets + 10**6, "offsets give tensor 0 of 1024 entries"),
    ("scan", "tile_max", lambda tile_max: tile_max[:-1], "tile_max must hold"),
    ("scan", "tile", lambda tile: 0, "tile must be 1 to 4096, got 0"),
    ("scan", "tile", lambda tile: 4097, "tile must be 1 to 4096, got 4097"),
    ("scan", "active_grad", lambda values: values[:-1], "active_grad must hold"),
    ("scan", "norms", lambda norms: norms[1:], "norms must hold 3 elements, got 2"),
    ("clip", "norms", lambda norms: norms.float(), "norms has the wrong dtype"),
    ("clip", "grad_norm", lambda norm: norm.float(), "grad_norm has the wrong dtype"),
    ("rank", "noise", lambda noise: torch.zeros(3, dtype=torch.int64), "noise must hold seed and"),
    ("rank", "tile_max", lambda tile_max: tile_max[:-1], "tile_max must hold"),
    ("cut", "param_bound", lambda bound: torch.zeros(3), "param_bound must hold 0 elements, got 3"),
    ("cut", "targets", lambda targets: targets[:0], "targets must hold at least one element"),
    ("cut", "targets", lambda targets: targets.int(), "targets has the wrong dtype"),
    ("cut", "new_position", lambda values: values[:-1], "new_position must hold"),
    ("cut", "progress", lambda progress: progress[:2], "progress must hold 3 elements, got 2"),
    ("append", "new_count", lambda count: count + 10**6, "more than there is room for"),
    ("append", "exp_avg", lambda values: values[1:], "exp_avg must hold"),
    ("append", "master", lambda master: torch.zeros(3), "master must hold"),
    ("update", "bias_correction", lambda name: "neither", "must be 'entry' or 'global'"),
    ("update", "group_index", lambda index: index + 7, r"group_index\[0\] is 7"),
    ("update", "group_index", lambda index: index - 1, r"group_index\[0\] is -1"),
    ("update", "hyper", lambda hyper: hyper.float(), "hyper has the wrong dtype"),
]


@pytest.mark.parametrize(
    ("name", "argument", "change", "message"),
    WRONG,
    ids=[f"{w[0]}-{w[1]}-{i}" for i, w in enumerate(WRONG)],
)
def test_wrong_arguments_are_named(name, argument, change, message):
    case = before(name, make_case([1024, 60], num_active=30, dense_sizes=[8]))
    args = list(arguments(name, case))
    index = names(name).index(argument)
    args[index] = change(args[index])
    with pytest.raises(RuntimeError, match=message):
        operator(name)(*args)


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_run_nothing(name):
    """torch.compile and meta tensors get through on shapes alone."""
    case = before(name, make_case([100], dtypes=DTYPES[1:2], num_active=10))
    meta = [
        [tensor.to("meta") for tensor in arg] if isinstance(arg, list)
        else arg.to("meta") if isinstance(arg, torch.Tensor) else arg
        for arg in arguments(name, case)
    ]  # fmt: skip
    assert operator(name)(*meta) is None
