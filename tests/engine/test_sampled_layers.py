"""Layers that sample: all but the weight gradient as ever, bit for bit; that within rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from op_cases import DTYPES, assert_as_exact, assert_same_bits
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_optim.backends.registry import load
from sparse_optim.engine import sampled
from sparse_optim.engine.sampled import Cover, Exchanged, Window
from sparse_optim.optim.attach import Layer, _kind

INPUTS: dict[str, Callable[[], Tensor]] = {
    "two dimensions": lambda: torch.randn(9, 12),
    "one token": lambda: torch.randn(1, 12),
    "no token": lambda: torch.randn(0, 12),
    "three dimensions": lambda: torch.randn(4, 5, 12),
    "four dimensions": lambda: torch.randn(2, 3, 5, 12),
    "transposed tokens": lambda: torch.randn(4, 5, 12).transpose(0, 1),
    "column major": lambda: torch.randn(12, 9).t(),
    "column major, three": lambda: torch.randn(12, 3, 5).permute(1, 2, 0),
    "slice": lambda: torch.randn(4, 5, 30)[..., 3:15],
    "expanded": lambda: torch.randn(1, 5, 12).expand(4, 5, 12),
    "one sequence": lambda: torch.randn(1, 5, 12),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 7),
    "no bias": lambda: nn.Linear(12, 7, bias=False),
    "Conv1D": lambda: Conv1D(7, 12),
}


# Conv1D itself refuses inputs whose tokens cannot be viewed as one dimension.
CASES = [
    (kind, shape)
    for kind in LAYERS
    for shape, make in INPUTS.items()
    if kind != "Conv1D" or make().is_contiguous() or make().dim() == 2
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def covered(layer: nn.Module, share: float = 0.1) -> tuple[nn.Module, Cover]:
    """A copy of the layer that samples, at random entries of its weight."""
    twin = copy.deepcopy(layer)
    size = twin.weight.numel()
    position = torch.randperm(size)[: int(share * size)].sort().values.int()
    cover = Cover(Window(), twin.weight, "reference")
    cover.renew(torch.zeros(position.numel()), position)
    cover.window.quiet = True
    build = _kind(twin)
    assert build is not None
    sampled.COVERS[-1] = cover
    forward = Layer(twin, build).build(-1, type(twin).forward)
    twin.forward = Exchanged(twin, "forward", forward, cover.window)
    return twin, cover


def pass_through(layer: nn.Module, x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Output and input gradient; the loss weighs each element differently."""
    given = x.detach().as_strided(x.size(), x.stride()).requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        out = layer(given)
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
    (out.float() * weights).sum().backward()
    return out.detach(), given.grad


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("dtype", [*DTYPES, "autocast bfloat16", "autocast float16"], ids=str)
def test_projections(kind, shape, dtype):
    cast = {"autocast bfloat16": torch.bfloat16, "autocast float16": torch.float16}.get(dtype)
    layer, x = LAYERS[kind](), INPUTS[shape]()
    if cast is None:
        layer, x = layer.to(dtype), x.to(dtype)
    twin, cover = covered(layer)
    for got, want in zip(pass_through(twin, x, cast), pass_through(layer, x, cast), strict=True):
        assert_same_bits(got, want)
    if layer.bias is not None:
        assert_same_bits(twin.bias.grad, layer.bias.grad)
    assert twin.weight.grad is None
    entries = layer.weight.grad.view(-1)[cover.position.long()]
    exact = copy.deepcopy(layer).double()
    exact.zero_grad()
    rounded = x if cast is None else x.to(cast)
    out = exact(rounded.double())
    weights = torch.linspace(-1, 2, out.numel()).view(out.shape)
    (out * weights.to(entries.dtype if cast is None else cast)).sum().backward()
    want = exact.weight.grad.view(-1)[cover.position.long()]
    assert_as_exact(cover.leaf.grad, entries.float(), want, scale=10.0)


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_that_are_not_contiguous(bias):
    """Of outputs that are transposed before they are used: sums over tokens go another way."""
    layer = nn.Linear(12, 64, bias=bias)
    twin, _ = covered(layer)
    for shape in ((5, 300, 12), (2, 5, 300, 12)):
        x, weights = torch.randn(shape), torch.randn(64, *shape[:-1])
        found = []
        for each in (twin, layer):
            each.zero_grad()
            given = x.clone().requires_grad_()
            (each(given).movedim(-1, 0) * weights).sum().backward()
            found.append((given.grad, each.bias.grad if bias else torch.empty(0)))
        for got, want in zip(*found, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("ids", [torch.int64, torch.int32])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings(dtype, padding, ids, backend):
    """Repeated tokens, rows without tokens, the row of the padding."""
    layer = nn.Embedding(20, 6, padding_idx=padding).to(dtype)
    twin, cover = covered(layer, share=0.4)
    cover.backend = backend
    tokens = torch.tensor([[3, 7, 7, 0, 19], [7, 3, 11, 0, 7]], dtype=ids)
    weights = torch.randn(2, 5, 6).to(dtype)
    outs = []
    for each in (twin, layer):
        out = each(tokens)
        (out * weights).sum().backward()
        outs.append(out.detach())
    assert_same_bits(*outs)
    assert twin.weight.grad is None
    exact = nn.Embedding(20, 6, padding_idx=padding).double()
    (exact(tokens) * weights.double()).sum().backward()
    where = cover.position.long()
    assert_as_exact(
        cover.leaf.grad,
        layer.weight.grad.view(-1)[where].float(),
        exact.weight.grad.view(-1)[where],
    )


def test_no_tokens():
    layer = nn.Embedding(20, 6)
    twin, cover = covered(layer)
    twin(torch.zeros(2, 0, dtype=torch.int64)).sum().backward()
    assert not cover.leaf.grad.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_dense_weights_take_the_dense_product(monkeypatch, transposed):
    """From a share of active entries on; the kernel is not called."""
    calls = []
    for name in ("reference", "cpp"):
        monkeypatch.setattr(load(name), "sampled_grad", lambda *args: calls.append(args))
    layer = (Conv1D if transposed else nn.Linear)(12, 12)
    twin, cover = covered(layer, share=0.25)
    x = torch.randn(5, 12)
    for each in (twin, layer):
        (each(x) ** 2).sum().backward()
    assert not calls
    want = layer.weight.grad.view(-1)[cover.position.long()]
    torch.testing.assert_close(cover.leaf.grad, want)


def test_another_default_dtype():
    """As a library sets while it loads a model in bfloat16, or for a whole run."""
    for layer, given in (
        (nn.Linear(12, 7), torch.randn(5, 12)),
        (nn.Embedding(9, 4), torch.ones(3).int()),
    ):
        twin, cover = covered(layer)
        torch.set_default_dtype(torch.float64)
        try:
            twin(given).sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        want = layer(given).sum()
        want.backward()
        entries = layer.weight.grad.view(-1)[cover.position.long()]
        torch.testing.assert_close(cover.leaf.grad, entries)
        assert cover.leaf.grad.dtype == torch.float32


def test_the_input_is_kept_only_for_active_entries():
    kept = []
    for share in (0.0, 0.1):
        twin, _ = covered(nn.Linear(12, 7), share)
        x = torch.randn(5, 12)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda value: value):
            twin(x)
        kept.append(any(value is not None and value.data_ptr() == x.data_ptr() for value in saved))
    assert kept == [False, True]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_forward_passes_without_gradients(mode):
    twin, cover = covered(nn.Linear(12, 7))
    cover.window.start = lambda: pytest.fail("the set is taken by a pass that trains")
    with mode():
        out = twin(torch.randn(5, 12))
    assert out.grad_fn is None


def test_another_weight_and_frozen_weights_are_left_alone():
    """torch.func.functional_call puts other parameters in; a weight may be frozen for a time."""
    twin, cover = covered(nn.Linear(12, 7))
    other = torch.randn(7, 12, requires_grad=True)
    torch.func.functional_call(twin, {"weight": other}, (torch.randn(5, 12),)).sum().backward()
    assert other.grad.any()
    assert cover.leaf.grad is None
    twin.weight.requires_grad_(False)
    twin(torch.randn(5, 12)).sum().backward()
    assert cover.leaf.grad is None
    assert twin.weight.grad is None


def test_autocast_keeps_a_weight_with_history_in_its_cache():
    """A layer that samples must not put a cast without history there: another use would lose its
    gradient."""
    twin, cover = covered(nn.Linear(12, 12))
    x = torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = twin(x)
        out = nn.functional.linear(out, twin.weight)
    out.sum().backward()
    assert twin.weight.grad.any()
    assert cover.leaf.grad.any()


def test_second_derivatives_are_refused():
    twin, _ = covered(nn.Linear(12, 7))
    x = torch.randn(5, 12, requires_grad=True)
    (grad,) = torch.autograd.grad((twin(x) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_sums_over_uses_and_graphs_are_autograds():
    """A layer that is used twice, a retained graph, several backward passes."""
    layer = nn.Linear(12, 12)
    twin, cover = covered(layer)
    x = torch.randn(5, 12)
    for each in (twin, layer):
        loss = (each(torch.tanh(each(x))) ** 2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        each(x).sum().backward()
    want = layer.weight.grad.view(-1)[cover.position.long()]
    torch.testing.assert_close(cover.leaf.grad, want)


def test_the_operator_for_the_compiler():
    """Its shape function and its results."""
    x, grad = torch.randn(5, 12), torch.randn(5, 7)
    position = torch.tensor([3, 50, 80], dtype=torch.int32)
    args = (x, grad, position, False, "reference")
    want = (grad.t() @ x).view(-1)[position.long()]
    torch.testing.assert_close(torch.ops.sparse_optim.weight_grad(*args), want)
    checks = ("test_schema", "test_faketensor")
    results = torch.library.opcheck(
        torch.ops.sparse_optim.weight_grad.default, args, test_utils=checks
    )
    assert set(results.values()) == {"SUCCESS"}
    assert sampled.weight_grad(*args).equal(torch.ops.sparse_optim.weight_grad(*args))
