"""A model that is left as it was found, memory, batches, and errors that say what to do."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from calibration_cases import (
    CLASSES,
    SCORES,
    assert_close,
    make_batches,
    make_model,
    trainable,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_optim import MaskedAdamW, Random, Static
from sparse_optim.calibration import fisher, grasp, snip


def snapshot(model: nn.Module) -> list[object]:
    found: list[object] = [module.training for module in model.modules()]
    for param in model.parameters():
        grad = None if param.grad is None else (id(param.grad), param.grad.tolist())
        found += [param.requires_grad, grad, param.tolist()]
        found.append(len(getattr(param, "_post_accumulate_grad_hooks", None) or ()))
    return [*found, torch.get_rng_state().tolist()]


class BrokenError(Exception):
    pass


def breaking(batches: list[dict[str, Tensor]]):
    yield batches[0]
    torch.rand(3)
    raise BrokenError


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was_found(name, fails):
    model = make_model()
    model.body.eval()
    model.body.bias.grad = torch.full((5,), 7.0)
    if fails and name == "synflow":
        model.head.register_forward_hook(lambda *_: next(breaking([]), None))
    before = snapshot(model)
    if fails:
        with pytest.raises((BrokenError, IndexError)):
            SCORES[name](model, breaking(make_batches()))
    else:
        loader = torch.utils.data.DataLoader(range(8), batch_size=4, shuffle=True)
        batches = [{**make_batches((4,))[0]} for _ in loader]
        before = snapshot(model)
        with torch.no_grad():
            SCORES[name](model, batches)
    assert snapshot(model) == before


def test_an_error_in_backward_leaves_nothing_in_grad():
    model = make_model()

    def fail(grad: Tensor) -> Tensor:
        raise BrokenError

    model.body.weight.register_hook(fail)
    with pytest.raises(BrokenError):
        fisher(model, make_batches())
    assert all(param.grad is None for param in model.parameters())
    assert model.training


def test_a_shuffling_loader_does_not_move_the_random_state():
    model, batch = make_model(), make_batches((8,))[0]
    rows = list(zip(batch["inputs"], batch["labels"], strict=True))
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)
    before = torch.get_rng_state()

    def loss(model, batch):
        return functional.cross_entropy(model(batch[0]).logits, batch[1])

    found = fisher(model, loader, loss=loss)
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(found, {n: score for n, score in fisher(model, [batch]).items()})


@pytest.mark.parametrize("name", SCORES)
def test_only_the_named_parameters_are_scored(name):
    model = make_model()
    every = SCORES[name](model, make_batches())
    assert list(every) == ["body.weight", "body.bias", "head.weight", "unused.weight"]
    some = SCORES[name](model, make_batches(), params=["body.bias"])
    assert list(some) == ["body.bias"]
    if name != "grasp":  # whose Hessian is then that of the named entries alone
        torch.testing.assert_close(some["body.bias"], every["body.bias"])
    with pytest.raises(ValueError, match=r"no parameter 'head.bias' that requires gradients"):
        SCORES[name](model, make_batches(), params=["head.bias"])


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of what operations make and what is still alive, but for `known` tensors."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return out

    def freed(self, nbytes: int) -> None:
        self.now -= nbytes


class Deep(nn.Sequential):
    """Ten equal layers."""

    width = 64

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(self.width, self.width, bias=False) for _ in range(10)))

    def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = super().forward(inputs)[:, :CLASSES]
        return SimpleNamespace(logits=logits, loss=functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", ["fisher", "expect", "child_tuning_d", "snip"])
def test_memory_is_one_score_an_entry_and_one_gradient(name):
    model = Deep()
    batch = {"inputs": torch.ones(1, model.width), "labels": torch.tensor([0])}
    layer_bytes = model[0].weight.nbytes
    with LiveBytes([*model.parameters(), *batch.values()]) as live:
        scores = SCORES[name](model, [batch] * 2)
    assert live.now == sum(score.nbytes for score in scores.values()) == 10 * layer_bytes
    assert 11 * layer_bytes <= live.peak <= 12 * layer_bytes


def test_nested_batches_are_split():
    model = nn.Linear(2, 1)

    def loss(model, batch):
        (first, (second,)), scale, note = batch
        assert first.shape == second.shape == (1, 2)
        assert note == "note"
        return scale * (model(first) * model(second)).sum()

    batch = [(torch.ones(3, 2), (torch.ones(3, 2),)), torch.tensor(2.0), "note"]
    assert bool((fisher(model, [batch], loss=loss)["weight"] > 0).all())


def no_loss(model: nn.Module, batch: object) -> Tensor:
    return torch.zeros(())


def nan_batches() -> list[dict[str, Tensor]]:
    (batch,) = make_batches((2,))
    return [{**batch, "inputs": batch["inputs"] * torch.nan}]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: fisher(m, []), "batches is empty"),
        (lambda m: snip(m, iter([])), "batches is empty"),
        (lambda m: grasp(m, []), "batches is empty"),
        (lambda m: fisher(m, make_batches(), samples=0), "samples must be at least 1, got 0"),
        (lambda m: fisher(m, make_batches(), sample_type="true"), "sample_type must be one of"),
        (lambda m: fisher(m, make_batches(), sample_type="expect", loss=no_loss), "give no loss"),
        (lambda m: fisher(m, make_batches(), loss=no_loss), "the loss has no gradient"),
        (lambda m: grasp(m, make_batches(), loss=no_loss), "the loss has no gradient"),
        (lambda m: snip(m, make_batches(), loss=lambda m, b: m(**b).logits), "0-dim tensor, got"),
        (lambda m: snip(m, [{"inputs": torch.ones(2, 4)}]), "returned no loss: put 'labels'"),
        (lambda m: snip(m, [torch.ones(2, 4)]), "a batch is a Tensor; expected a dict"),
        (lambda m: fisher(m, [[torch.ones(2), torch.ones(3)]]), r"dimensions of .* \[2, 3\]"),
        (lambda m: fisher(m, [{"a": "text"}]), r"first dimensions of its tensors are \[\]"),
        (lambda m: snip(m, nan_batches()), r"the scores of body\.weight are NaN or infinite"),
        (lambda m: fisher(m.requires_grad_(False), make_batches()), "nothing to score"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do_and_leave_the_model_alone(call, message):
    model = make_model()
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert [module.training for module in model.modules()] == modes
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("name", SCORES)
def test_a_model_whose_layers_sample_is_scored_as_ever(name):
    """In the middle of a run with sampled_backward=True, on a quiet step."""
    model, twin = make_model(), make_model()
    optimizer = MaskedAdamW(
        trainable(model).items(), lr=0.0, weight_decay=0.0, importance=Random(0),
        selection=Static(9), max_grad_norm=1.0, model=model, sampled_backward=True,
    )  # fmt: skip
    model(**make_batches()[0]).loss.backward()
    assert model.body.weight.grad is None
    optimizer.step()
    for each in (model, twin):
        torch.manual_seed(1)
        each.scores = SCORES[name](each, make_batches())
    assert_close(model.scores, twin.scores)
    model(**make_batches()[0]).loss.backward()
    assert model.body.weight.grad is None
