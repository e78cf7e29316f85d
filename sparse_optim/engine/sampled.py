"""Sampled weight gradients: on quiet steps, layers compute those of active entries alone.

    forward    as ever; the input is kept only where the layer's weight has an active entry
    backward   grad_input, grad_bias as ever
               leaf.grad[e] += sum over tokens t of grad_output[t, row(e)] * input[t, column(e)]
    step()     active.grad <- leaf.grad, and what is gathered from `.grad`; clip; update

Outputs and all other gradients are those of the layer itself, bit for bit. Each weight has a leaf,
a float32 vector with an element for each active entry, whose gradient is the sampled one: sums over
micro-batches, uses of a weight and graphs are autograd's. Where a weight is also used in other ways
(functionally, or through a layer of another kind), autograd writes its `.grad`: from there the
entries are gathered, and added.

On loud steps the layers work as ever, and another source (`.grad`, or the backward hooks) selects.
`step()` consumes the gradients of both kinds of steps.

Reference for the operation: `sparse_optim.backends.reference.sampled_grad`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparse_optim.backends.registry import load
from sparse_optim.engine.engine import Engine
from sparse_optim.engine.fused_backward import FusedBackward, nothing_came, would_lose
from sparse_optim.engine.pool import Gradients
from sparse_optim.engine.replicas import Replicas, check_wrapped

# From this share of active entries on, the dense product is taken and read at these entries. On two
# cores both take the same at 20% in float32 and 12% in bfloat16. On GPUs, whose dense products are
# faster, the shares are predictions (see csrc/cuda/sampled_grad.cu) that nobody has measured.
DENSE_SHARE = {
    "cpu": {torch.float32: 0.2, torch.bfloat16: 0.1, torch.float16: 0.1},
    "cuda": {torch.float32: 0.03, torch.bfloat16: 0.003, torch.float16: 0.003},
}

CLOSED = (False, -2)  # the stamp of a window whose source is gone


class Window:
    """What the layers of a source have in common between two calls of step().

    Attributes:
        quiet: whether layers sample.
        dense: how many `dense_gradients` are open, in which they do not.
        stamp: names the kind of step and the active set.
        closed: whether the source is gone; layers are then as ever.
        start: called before the first forward pass that needs gradients, or None.
        replicas: averages the gradients over processes, if there are several.
    """

    def __init__(self) -> None:
        self.quiet = self.closed = False
        self.dense = 0
        self.stamp: tuple[bool, int] = (False, -1)
        self.start: Callable[[], None] | None = None
        self.replicas = Replicas()

    @staticmethod
    def of(module: torch.nn.Module) -> Window | None:
        """That of a layer whose forward pass was exchanged."""
        own = vars(module).get("forward")
        return own.window if isinstance(own, Exchanged) and not own.window.closed else None


class Exchanged:
    """What takes the place of a method of one module.

    Args:
        module: held weakly, so that it needs no garbage collector.
        name: of the method.
        function: takes its place.
        window: of the source that exchanged it.
    """

    def __init__(
        self, module: torch.nn.Module, name: str, function: Callable[..., Any], window: Window
    ) -> None:
        self.module, self.name, self.function, self.window = (
            weakref.ref(module), name, function, window,
        )  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module(), *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module has its class's method in this place."""
        return getattr, (self.module(), self.name)


@contextmanager
def dense_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, forward passes of the model give ordinary gradients for all entries."""
    windows = {window for module in model.modules() if (window := Window.of(module))}
    for window in windows:
        window.dense += 1
    try:
        yield
    finally:
        for window in windows:
            window.dense -= 1


class Cover:
    """A weight of the pool, as its layers see it.

    Attributes:
        window: of the source.
        param: the weight.
        backend: name of the backend whose `sampled_grad` runs.
        leaf: (n,), float32; its gradient is that of the active entries. Its values mean nothing.
        position: (n,), int32, of the active entries.
    """

    def __init__(self, window: Window, param: Tensor, backend: str) -> None:
        self.window, self.param, self.backend = window, param, backend
        self.renew(
            torch.empty(0, dtype=torch.float32, device=param.device),
            torch.empty(0, dtype=torch.int32, device=param.device),
        )

    def renew(self, values: Tensor, position: Tensor) -> None:
        """Take another active set; `values`, (n,), float32, lend their memory."""
        self.leaf, self.position = values.detach().requires_grad_(), position
        if compiler := _compiler():  # sizes differ from set to set, and should not compile anew
            for tensor in (self.leaf, self.position):
                compiler.maybe_mark_dynamic(tensor, 0)

    def samples(self, weight: Tensor) -> bool:
        """Whether a forward pass with this weight is to give sampled gradients."""
        window = self.window
        if window.closed or window.dense or not torch.is_grad_enabled():
            return False
        if not torch.compiler.is_compiling():
            check_wrapped(window.replicas)
            if window.start is not None:
                window.start()
        return window.quiet and weight is self.param and weight.requires_grad

    def check(self, stamp: tuple[bool, int] | None) -> None:
        """Raise RuntimeError if a forward pass had another active set."""
        if stamp is not None and stamp != self.window.stamp:
            raise RuntimeError(
                "backward() after step(), or after a change of the optimizer, of a forward pass "
                "before it: with sampled_backward=True the active entries have changed since. Call "
                "backward() first, or use `with optimizer.dense_gradients():` around both passes"
            )


# Layers find their covers here by number: torch.compile takes the sizes of tensors that it reaches
# through a module as constant, and would compile anew for each active set.
COVERS: dict[int, Cover] = {}


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, cover: Cover) -> Tensor:
    """`torch.nn.functional.linear` with sampled weight gradients; weight (out, in)."""
    input, weight, bias = _as_autocast(input, weight, bias)
    return _Projection.apply(input, weight, bias, cover.leaf, cover, False)  # type: ignore


def conv1d(input: Tensor, weight: Tensor, bias: Tensor, cover: Cover) -> Tensor:
    """transformers' `Conv1D` with sampled weight gradients; weight (in, out)."""
    input, weight, cast_bias = _as_autocast(input, weight, bias)
    return _Projection.apply(input, weight, cast_bias, cover.leaf, cover, True)  # type: ignore


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None, cover: Cover) -> Tensor:
    """`torch.nn.functional.embedding` with sampled weight gradients."""
    return _Lookup.apply(ids, weight, cover.leaf, padding_idx, cover)  # type: ignore


def _as_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast would cast them.

    Within the autograd function it would put a weight without history into its cache, from which
    another use of the weight takes it.
    """
    device = input.device.type
    if not torch.is_autocast_enabled(device) or input.dtype == torch.float64:
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    if weight.dtype != dtype:
        with torch.no_grad():
            weight = weight.to(dtype)
        weight.requires_grad_()  # linear asks for it when it chooses a kernel
    return input.to(dtype), weight, None if bias is None else bias.to(dtype)


class _Projection(torch.autograd.Function):
    """input (..., in) times a weight, of which `leaf` gets the gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, leaf: Tensor, cover: Cover,
        transposed: bool,
    ) -> Tensor:  # fmt: skip
        ctx.cover, ctx.transposed, ctx.position = cover, transposed, cover.position
        ctx.stamp = None if torch.compiler.is_compiling() else cover.window.stamp
        ctx.shape = input.shape
        # As torch.nn.functional.linear does; sums over the bias follow the same shape.
        ctx.flat = transposed or input.dim() == 2 or (input.dim() == 3 and input.is_contiguous())
        rows = input.reshape(-1, input.size(-1))
        ctx.column_major = rows.stride(0) == 1 and rows.stride(1) == rows.size(0)
        ctx.save_for_backward(input if leaf.numel() else None, weight)
        if not transposed:
            return functional.linear(input, weight, bias)
        size = (*input.shape[:-1], weight.size(1))
        assert bias is not None  # Conv1D always has one
        return torch.addmm(bias, input.view(-1, input.size(-1)), weight).view(size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        ctx.cover.check(ctx.stamp)
        input, weight = ctx.saved_tensors
        grad = grad_output.reshape(-1, grad_output.size(-1))
        # First, so that the gradient of the input is in the cache for what comes next: a backward
        # pass of BERT-base took 28 ms less of 1,060.
        if input is None:
            of_leaf = _zeros(ctx.position)
        else:
            tokens = input.reshape(-1, input.size(-1))
            of_leaf = weight_grad(tokens, grad, ctx.position, ctx.transposed, ctx.cover.backend)
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            plain = weight.t() if ctx.transposed else weight
            product = plain.t().mm(grad.t()).t() if ctx.column_major else grad.mm(plain)
            of_input = product.reshape(ctx.shape)
        if ctx.needs_input_grad[2]:
            of_bias = grad if ctx.flat else grad_output  # autograd sums over the tokens
        return of_input, None, of_bias, of_leaf, None, None


class _Lookup(torch.autograd.Function):
    """Rows of a weight, of which `leaf` gets the gradient."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, leaf: Tensor, padding_idx: int | None, cover: Cover
    ) -> Tensor:
        ctx.cover, ctx.padding_idx, ctx.position = cover, padding_idx, cover.position
        ctx.stamp = None if torch.compiler.is_compiling() else cover.window.stamp
        ctx.save_for_backward(ids)
        return functional.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        ctx.cover.check(ctx.stamp)
        (ids,) = ctx.saved_tensors
        of_leaf = lookup_grad(ids, grad_output, ctx.position, ctx.padding_idx)
        return None, None, of_leaf, None, None


def weight_grad(
    input: Tensor, grad_output: Tensor, position: Tensor, transposed: bool, backend: str
) -> Tensor:
    """Gradient of a weight at `position`, (n,), float32; see `reference.sampled_grad`."""
    if torch.compiler.is_compiling() or type(grad_output) is not Tensor:  # fake tensors, too
        found: Tensor = torch.ops.sparse_optim.weight_grad(
            input, grad_output, position, transposed, backend
        )
        return found
    return _weight_grad(input, grad_output, position, transposed, backend)


def _weight_grad(
    input: Tensor, grad_output: Tensor, position: Tensor, transposed: bool, backend: str
) -> Tensor:
    size = input.size(1) * grad_output.size(1)
    share = DENSE_SHARE["cpu" if input.device.type == "cpu" else "cuda"][grad_output.dtype]
    if position.numel() > share * size:
        outer, inner = (input, grad_output) if transposed else (grad_output, input)
        return outer.t().mm(inner).view(-1)[position.long()].float()
    out = _zeros(position)
    load(backend).sampled_grad(input, grad_output, position, transposed, out)
    return out


def _zeros(position: Tensor) -> Tensor:
    """A float32 for each position, whatever torch's default dtype is."""
    return torch.zeros(position.numel(), dtype=torch.float32, device=position.device)


def _weight_grad_shape(
    input: Tensor, grad_output: Tensor, position: Tensor, transposed: bool, backend: str
) -> Tensor:
    return input.new_empty(position.numel(), dtype=torch.float32)


_library = torch.library.Library("sparse_optim", "FRAGMENT")
_library.define(
    "weight_grad(Tensor input, Tensor grad_output, Tensor position, bool transposed, str backend) "
    "-> Tensor"
)
_library.impl("weight_grad", _weight_grad, "CompositeExplicitAutograd")
torch.library.register_fake("sparse_optim::weight_grad", _weight_grad_shape, lib=_library)


def lookup_grad(
    ids: Tensor, grad_output: Tensor, position: Tensor, padding_idx: int | None
) -> Tensor:
    """Gradient of a table of rows at some of its entries.

    Args:
        ids: (...), integers, the row of each token.
        grad_output: (..., width).
        position: (n,), int32, flat positions in the table.
        padding_idx: a row that gets no gradient.

    Returns:
        (n,), float32. Sums are taken in float32 in the order of the tokens.
    """
    width, tokens = grad_output.size(-1), ids.numel()
    if not tokens or not position.numel():
        return _zeros(position)
    row, column = position.long() // width, position.long() % width
    ordered, order = ids.reshape(-1).long().sort(stable=True)
    place = torch.zeros_like(ordered)  # which of the distinct ids a token has, 0, 1, ...
    place[1:] = (ordered.diff() != 0).cumsum(0)
    of_token = torch.empty_like(place)
    of_token[order] = place
    grad = grad_output.reshape(-1, width).float()
    sums = torch.ops.aten.embedding_dense_backward(grad, of_token, tokens, -1, False)
    first = torch.searchsorted(ordered, row).clamp(max=tokens - 1)
    found = ordered[first] == row
    if padding_idx is not None:
        found &= row != padding_idx
    return torch.where(found, sums[place[first], column], 0.0)


class SampledBackward:
    """The source of gradients that takes those of active entries from the layers.

    Args:
        engine: whose active set it is.
        inner: the source that takes ordinary gradients: the engine itself, or backward hooks.
        dense: parameters trained densely beside the pool; a step also consumes their gradients.
        indices: of the weights in the pool whose layers sample.

    Attributes:
        window: what the layers have in common.
        covers: what the layers of each weight need, by its index in the pool.
        stepped: a step has consumed the gradients, and none has come since.
    """

    def __init__(
        self,
        engine: Engine,
        inner: Engine | FusedBackward,
        dense: Sequence[Tensor],
        indices: Sequence[int],
    ) -> None:
        self._engine, self._inner, self._dense = engine, inner, dense
        self._hooks = inner if isinstance(inner, FusedBackward) else None
        self.window = Window()
        self.covers = {
            index: Cover(self.window, engine.pool.params[index], engine.backend)
            for index in indices
        }
        self._pool: Sequence[Tensor] = ()
        self.stepped = False
        self._arrived: set[int] = set()
        if engine.may_unmask_fixed:
            source = weakref.ref(self)
            self.window.start = lambda: _start(source)
        self._prepare()

    @property
    def holds_any(self) -> bool:
        """Whether a layer has given gradients that no step has used."""
        inner = self._hooks is not None and self._hooks.holds_any
        return inner or any(cover.leaf.grad is not None for cover in self.covers.values())

    def check_idle(self, what: str) -> None:
        """Raise RuntimeError if gradients were taken that no step has used."""
        if self.holds_any:
            raise would_lose(what, "sampled_backward")

    def discard(self) -> None:
        """Forget what the layers gave, as `zero_grad()` forgets gradients."""
        for cover in self.covers.values():
            cover.leaf.grad = None
        self._arrived.clear()
        self._pool = ()
        self.stepped = False
        self._inner.discard()

    def bind(self, dense: Sequence[Tensor]) -> Gradients:
        """This step's gradients, of which there is at least one; see `Source`.

        Raises:
            RuntimeError: none has come since the last step, or nothing averages them.
        """
        quiet, replicas = self.window.quiet, self.window.replicas
        check_wrapped(replicas)
        if self._hooks is not None:
            present = list(self._hooks.collect())
        else:
            grads = self._inner.bind(dense)
            self._pool = grads.pool
            present = [bool(grad.numel()) for grad in grads.pool]
        for index, cover in self.covers.items():
            present[index] = present[index] or cover.leaf.grad is not None
        for index in replicas.indices(self._engine.pool.params):
            present[index] = replicas.came(self._engine.pool.params[index])
        if self.stepped and not any(present) and not any(grad.numel() for grad in dense):
            raise nothing_came("sampled_backward")
        if quiet or self._hooks is not None:
            return self._engine.bind_stand_ins(present, dense)
        return grads

    def select(self, grads: Gradients) -> None:
        """On a loud step, as the inner source; on a quiet one, fill in the active gradients."""
        if not self.window.quiet:
            self._inner.select(grads)
            return
        engine = self._engine
        active, work = engine.active, engine.work
        if self._hooks is not None:
            self._hooks.begin()
            found_inf = work.scalars.found_inf
            found_inf.copy_(torch.maximum(found_inf, self._hooks.found_inf))
        else:
            active.grad.zero_()
            engine.gather(self._pool)
        for index, cover in self.covers.items():
            if cover.leaf.grad is not None:
                active.grad[engine.segment(index)] += cover.leaf.grad
        ours = self.window.replicas.indices(engine.pool.params)
        self.window.replicas.average([active.grad[engine.segment(index)] for index in ours])
        work.new.count.zero_()
        engine.measure(grads.dense)

    def end(self) -> None:
        """All gradients are consumed; the next forward pass is of another step."""
        for param in (*self._engine.pool.params, *self._dense):
            param.grad = None
        self._inner.end()
        self.discard()
        self.stepped = True
        self._prepare()

    @property
    def nbytes(self) -> int:
        """Bytes held beside the engine's own buffers."""
        return 0 if self._hooks is None else self._hooks.nbytes

    def start(self) -> None:
        """Take a set whose scores need no gradients, so that no step is loud."""
        self.window.start = None
        if self._engine.may_unmask_fixed:
            with torch.no_grad():
                self._engine.unmask_fixed()
        self._prepare()

    def _prepare(self) -> None:
        """Tell the layers what the next step is, and show them the active set."""
        engine, quiet = self._engine, not self._engine.loud
        stamp = (quiet, engine.set_version if quiet else -1)
        if quiet and stamp != self.window.stamp:
            for index, cover in self.covers.items():
                part = engine.segment(index)
                cover.renew(engine.active.grad[part], engine.active.position[part])
                if self._hooks is not None:
                    hook = _Once(self, index)
                    cover.leaf.register_post_accumulate_grad_hook(hook)
        self.window.quiet, self.window.stamp = quiet, stamp

    def arrive(self, index: int) -> None:
        """Note the gradient of a leaf; with backward hooks a second one raises RuntimeError."""
        if self._hooks is not None:
            self._hooks.check_first(index, index in self._arrived)
        self._arrived.add(index)


class _Once:
    """Tells the source of a leaf's gradient; nothing once the source is gone."""

    def __init__(self, source: SampledBackward, index: int) -> None:
        self.source, self.index = weakref.ref(source), index

    def __call__(self, leaf: Tensor) -> None:
        if (source := self.source()) is not None:
            source.arrive(self.index)


def _start(reference: weakref.ref[SampledBackward]) -> None:
    if (source := reference()) is not None:
        source.start()


def _compiler() -> Any:
    """torch._dynamo, if something has imported it."""
    return sys.modules.get("torch._dynamo")
