"""The weights that DistributedDataParallel leaves to an optimizer with sampled gradients.

DDP's constructor iterates, once, over the names in an attribute of the model. `LeftOut` is the
value of that attribute. It stays on the model, since a wrapper leaves weights out for as long as it
lives; a hook on the model notes each wrapper whose forward pass runs, and refuses one whose
gradients nobody would average. Copies and pickles of the model have neither.

See `sparse_optim.engine.replicas` for the averages.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable imports the compiler
from torch.nn.parallel import DistributedDataParallel

from sparse_optim.engine.engine import Engine
from sparse_optim.engine.replicas import Replicas, check_wrapped, is_distributed
from sparse_optim.engine.sampled import Exchanged, SampledBackward, Window
from sparse_optim.optim.attach import Layer
from sparse_optim.optim.compare_replicas import compare_replicas

IGNORED = "_ddp_params_and_buffers_to_ignore"  # where DDP's constructor looks


class LeftOut:
    """Names of the weights that wrappers of a model are to leave out; one object for each model.

    Args:
        given: names that are to be left out for other reasons.

    Attributes:
        replicas: averages the gradients of what the wrapper leaves out.
    """

    def __init__(self, given: Iterable[str] = ()) -> None:
        self.replicas = Replicas()
        self._given = frozenset(given)
        self._names: dict[str, Tensor] = {}  # those of a wrapper to come
        self._known: dict[str, Tensor] = {}  # those that a wrapper may have left out
        self._for_ddp: list[Tensor] = []  # might sample, but DDP needs a parameter
        self._reads = 0
        self._readers: list[weakref.ref[Any]] = []
        self._wrapper: weakref.ref[Any] | None = None
        self._window = Window()
        self._owner: weakref.ref[Any] | None = None
        self._compared = self._started = False
        self._versions: list[int] | None = None  # of the weights, in forward passes before step()
        self._written = False

    @staticmethod
    def of(model: nn.Module) -> LeftOut:
        """That of a model, which gets one if it has none.

        Raises:
            ValueError: the model is a wrapper.
        """
        if isinstance(model, DistributedDataParallel):
            raise ValueError(
                "model is a DistributedDataParallel, which has read already what to leave out: "
                "build the optimizer with the model inside, model=model, then wrap that"
            )
        found = vars(model).get(IGNORED, ())
        if isinstance(found, LeftOut):
            return found
        left = LeftOut(found)
        setattr(model, IGNORED, left)
        model.register_forward_pre_hook(_Hook(left), prepend=True)
        return left

    def __iter__(self) -> Iterator[str]:
        """Names to leave out; DDP's constructor reads them here."""
        names = {} if self._window.closed else self._names
        self._reads += bool(names)
        return iter({*self._given, *map(_Name, names)})

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has the names alone that others gave."""
        return set, (set(self._given),)

    @property
    def _bound(self) -> bool:
        """Whether a wrapper that has read the names may be alive."""
        return self._reads > len(self._readers) or any(read() is not None for read in self._readers)

    def choose(
        self, model: nn.Module, layers: Mapping[int, list[Layer]], params: Sequence[Tensor]
    ) -> dict[int, list[Layer]]:
        """The layers that may sample, by the index of their weight in `params`.

        Those are all, but for the smallest weight where DDP would have no trainable parameter.

        Raises:
            ValueError: none remains, a wrapper averages one of the weights already, or another
                optimizer samples in other layers of the model.
        """
        if not self._window.closed and self._owner is not None and self._owner() is not None:
            raise ValueError(
                "in several processes one optimizer with sampled_backward=True can be attached to "
                "a model: give it the parameters of both, or leave sampled_backward False"
            )
        bound = self._bound
        covered = {id(params[index]) for index in layers}
        others = (p for p in model.parameters() if id(p) not in covered)
        if not bound:
            self._for_ddp = []
            if not any(param.requires_grad for param in others):
                self._for_ddp = [min((params[index] for index in layers), key=Tensor.numel)]
        kept = {id(param) for param in self._for_ddp}
        chosen = {i: each for i, each in layers.items() if id(params[i]) not in kept}
        if not chosen:
            raise ValueError(
                "sampled_backward=True in several processes, but the model has no trainable "
                "parameter beside the weight that would sample, and DistributedDataParallel needs "
                "one: leave sampled_backward False"
            )
        known = {id(weight) for weight in self._known.values()}
        late = [params[index] for index in chosen if id(params[index]) not in known]
        if bound and late:
            raise ValueError(
                f"{_names_of(model, late)} would sample, but a DistributedDataParallel of this "
                "model was built before, and averages or ignores them. Make this change first, "
                "then wrap the model; or set sampled_backward = False"
            )
        return chosen

    def take(self, model: nn.Module, source: SampledBackward, owner: object) -> None:
        """Leave out the weights of the source's covers, for an optimizer that takes the steps."""
        wanted = {id(cover.param) for cover in source.covers.values()}
        self._names = {
            name: param
            for prefix, module in model.named_modules()
            for own, param in module.named_parameters(recurse=False)
            if id(param) in wanted
            # DDP looks for parameters of the model itself under both names.
            for name in ([f"{prefix}.{own}"] if prefix else [own, f".{own}"])
        }
        self._known = {**(self._known if self._bound else {}), **self._names}
        self._window, self._owner = source.window, weakref.ref(owner)
        source.window.replicas = self.replicas
        self._compared = False

    def enter(self, model: nn.Module) -> None:
        """Note the wrapper whose forward pass runs; begin a run whose set needs no gradients.

        Raises:
            RuntimeError: gradients of this pass would not be averaged.
        """
        parallel: Any = DistributedDataParallel
        wrapper = parallel._get_active_ddp_module()  # noqa: SLF001 - there is no public way
        runs = wrapper is not None and wrapper.module is model
        if runs and (self._wrapper is None or self._wrapper() is not wrapper):
            self._meet(wrapper)
        if not torch.is_grad_enabled():
            return
        if runs:
            self._check(wrapper)
            self._watch()
        window = self._window
        if window.start is not None and not window.dense and self.replicas.group is not None:
            window.start()  # not in the first layer: this process might run none

    def _meet(self, wrapper: Any) -> None:
        names = [name for name in self._known if name in wrapper.parameters_to_ignore]
        if names and not any(read() is wrapper for read in self._readers):
            self._readers.append(weakref.ref(wrapper))
        weights = {id(self._known[name]): self._known[name] for name in names}
        self.replicas.weights = list(weights.values())
        self.replicas.group = wrapper.process_group
        self._wrapper, self._started, self._versions = weakref.ref(wrapper), False, None
        own = vars(wrapper).get("zero_grad")
        if own is None:
            exchanged = Exchanged(wrapper, "zero_grad", _zero_grad, self._window)
            object.__setattr__(wrapper, "zero_grad", exchanged)

    def _check(self, wrapper: Any) -> None:
        """Raise RuntimeError if this wrapper and the optimizer do not fit."""
        left = {id(weight) for weight in self.replicas.weights}
        owner = None if self._owner is None else self._owner()
        samples = not self._window.closed
        if samples and any(id(param) not in left for param in self._names.values()):
            raise RuntimeError(
                "sampled_backward=True, but DistributedDataParallel averages weights whose layers "
                "sample, and would wait for gradients that do not come. Keep this order: "
                "init_process_group(); the optimizer, with model=model; "
                "DistributedDataParallel(model)"
            )
        if left and owner is None:
            raise RuntimeError(
                "DistributedDataParallel was built for an optimizer with sampled_backward=True, "
                "which is gone, and leaves weights out whose gradients nothing would average: wrap "
                "the model again, DistributedDataParallel(model)"
            )
        if left and wrapper._join_config.enable:  # noqa: SLF001 - as DDP's own forward asks
            raise RuntimeError(
                "sampled_backward=True does not work in DDP's join(), even after it: a process "
                "without data would not take part in step(). Wrap the model again and give all "
                "processes as many batches, or set sampled_backward = False first"
            )
        if left and wrapper.mixed_precision is not None:
            raise RuntimeError(
                "sampled_backward=True does not work with DistributedDataParallel's "
                "mixed_precision, which casts no weights that are left out: use torch.autocast"
            )

    def _watch(self) -> None:
        """Raise RuntimeError if, as it seems, another optimizer trains the weights.

        Between passes without a step of ours, other code may write them once: the next step then
        compares the processes.
        """
        versions = [weight._version for weight in self.replicas.weights]
        if self._versions is None:
            self._written = False
        elif versions != self._versions:
            if self._written:
                raise RuntimeError(
                    "other code writes weights that DistributedDataParallel leaves to an optimizer "
                    "with sampled_backward=True, which takes no steps. If another optimizer trains "
                    "them, nothing averages their gradients: set sampled_backward = False on the "
                    "first, or delete it and what refers to it (a learning rate scheduler); then "
                    "wrap the model again, and build the other optimizer anew, since its state "
                    "differs between the processes"
                )
            self._written, self._compared = True, False
        self._versions = versions

    def begin_step(self, engine: Engine, source: SampledBackward | None) -> None:
        """Average what an ordinary or a loud step reads; compare processes where they may differ.

        Raises:
            RuntimeError: in all processes, if they differ; if no forward pass of a wrapper was
                seen; if the wrapper leaves out what this optimizer does not rank.
        """
        self._versions = None
        if not is_distributed():
            return
        replicas = self.replicas
        if source is not None or self._bound:
            check_wrapped(replicas)
        if not replicas.weights:
            return
        ranked = replicas.indices(engine.pool.params)
        if len(ranked) < len(replicas.weights):
            raise RuntimeError(
                "DistributedDataParallel leaves out weights that this optimizer does not rank, so "
                "that nothing would average their gradients: wrap the model again, "
                "DistributedDataParallel(model)"
            )
        if not self._started:
            self._compare(engine)
            self._started = True
        leaves = {} if source is None else {id(c.param): c.leaf for c in source.covers.values()}

        def gave(weight: Tensor) -> bool:
            leaf = leaves.get(id(weight))
            return weight.grad is not None or (leaf is not None and leaf.grad is not None)

        if replicas.agree(gave, not self._compared, engine.pool.device):
            self._compare(engine)
        if source is None or not source.window.quiet:
            replicas.average_whole()

    def _compare(self, engine: Engine) -> None:
        left = [name for name, param in self._known.items() if self.replicas.indices([param])]
        compare_replicas(engine, self.replicas, left)
        self._compared = True


class _Hook:
    """Tells of each forward pass of the model."""

    def __init__(self, left: LeftOut) -> None:
        self.left = left

    @_disable_dynamo
    def __call__(self, model: nn.Module, args: Any) -> None:
        self.left.enter(model)

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copy of the model, what gives the arguments back as they are."""
        return getattr, ({}, "get")


class _Name(str):
    """A name that a wrapper leaves out. In a copy of the wrapper it names nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (f"{self} (of the model that was copied)",)


def _zero_grad(wrapper: Any, set_to_none: bool = True) -> None:
    """What the model's own `zero_grad` discards, the wrapper's discards too."""
    type(wrapper).zero_grad(wrapper, set_to_none)
    wrapper.module.zero_grad(set_to_none)


def _names_of(model: nn.Module, params: Sequence[Tensor]) -> str:
    names = {id(param): name for name, param in model.named_parameters()}
    return ", ".join(names.get(id(param), "a parameter of the optimizer") for param in params)
