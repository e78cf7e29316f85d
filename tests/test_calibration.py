"""Calibration scores against brute force, and a model that is left as it was found."""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_optim.calibration import child_tuning_d, fisher, grasp, snip, synflow

CLASSES = 3


class Classifier(nn.Module):
    """Two layers and dropout, called as transformers models are."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, CLASSES)
        self.unused = nn.Linear(2, 2, bias=False)
        self.to(dtype)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(self.dropout(torch.tanh(self.body(inputs))))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def make_model(dtype: torch.dtype = torch.float32) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(dtype)
    model.head.bias.requires_grad_(False)
    return model


def make_batches(sizes=(4, 3, 1), dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "inputs": torch.randn(size, 4, generator=generator).to(dtype),
            "labels": torch.randint(CLASSES, (size,), generator=generator),
        }
        for size in sizes
    ]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def gradient(value: Tensor, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(param) if grad is None else grad
        for (name, param), grad in zip(params.items(), grads, strict=True)
    }


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, score in found.items():
        assert score.dtype == torch.float32
        assert not score.requires_grad
        assert bool((score >= 0).all()), name
        torch.testing.assert_close(score, expected[name].float(), rtol=1e-5, atol=1e-8)
        assert name == "unused.weight" or bool((score > 0).any()), name


def test_fisher_is_the_sum_of_squared_gradients_of_single_samples():
    model, batches = make_model(), make_batches()
    found = fisher(model, batches)
    reference = copy.deepcopy(model).eval()
    params = trainable(reference)
    expected = {name: torch.zeros_like(param) for name, param in params.items()}
    for batch in batches:
        for inputs, label in zip(batch["inputs"], batch["labels"], strict=True):
            grads = gradient(reference(inputs[None], label[None]).loss, params)
            expected = {name: score + grads[name] ** 2 for name, score in expected.items()}
    assert_close(found, expected)


def test_expected_fisher_sums_over_classes():
    model = make_model()
    unlabelled = [{"inputs": batch["inputs"]} for batch in make_batches()]
    found = fisher(model, unlabelled, sample_type="expect")
    reference = copy.deepcopy(model).eval()
    params = trainable(reference)
    expected = {name: torch.zeros_like(param) for name, param in params.items()}
    for inputs in torch.cat([batch["inputs"] for batch in unlabelled]):
        log_probs = reference(inputs[None]).logits.log_softmax(-1)[0]
        for log_prob in log_probs:
            grads = gradient(log_prob, params)
            expected = {
                name: score + log_prob.detach().exp() * grads[name] ** 2
                for name, score in expected.items()
            }
    assert_close(found, expected)


def test_expect_is_the_mean_of_label_over_labels_drawn_from_the_model():
    model = make_model()
    inputs = make_batches((1,))[0]["inputs"]
    expected = fisher(model, [{"inputs": inputs}], sample_type="expect")
    probs = model.eval()(inputs).logits.softmax(-1)[0].detach()
    labelled = [
        fisher(model, [{"inputs": inputs, "labels": torch.tensor([label])}])
        for label in range(CLASSES)
    ]
    mean = {
        name: sum(p * scores[name] for p, scores in zip(probs, labelled, strict=True))
        for name in expected
    }
    assert_close(expected, mean)


def test_fisher_does_not_depend_on_how_samples_are_batched_and_stops_at_samples():
    model = make_model()
    one = fisher(model, make_batches((5,)), samples=5)
    parts = make_batches((5,))[0]
    singles = [{name: tensor[row : row + 1] for name, tensor in parts.items()} for row in range(5)]
    for name, score in fisher(model, singles).items():
        torch.testing.assert_close(score, one[name])
    two, first = fisher(model, make_batches((5,)), samples=2), fisher(model, singles[:2])
    assert all(torch.equal(two[name], first[name]) for name in two)
    assert not torch.equal(two["body.weight"], one["body.weight"])


def test_child_tuning_d_squares_the_gradients_of_batches():
    model, batches = make_model(), make_batches()
    found = child_tuning_d(model, batches)
    reference = copy.deepcopy(model).eval()
    params = trainable(reference)
    grads = [gradient(reference(**batch).loss, params) for batch in batches]
    expected = {name: sum(grad[name] ** 2 for grad in grads) / len(grads) for name in params}
    assert_close(found, expected)


def test_snip_is_gradient_times_parameter():
    model, batches = make_model(), make_batches()
    reference = copy.deepcopy(model).eval()
    params = trainable(reference)
    loss = sum(reference(**batch).loss for batch in batches) / len(batches)
    grads = gradient(loss, params)
    assert_close(
        snip(model, batches), {n: (p * grads[n]).abs().detach() for n, p in params.items()}
    )


def test_snip_of_one_entry_predicts_the_change_of_the_loss_without_it():
    model, batch = make_model().eval(), make_batches((8,))[0]
    model.body.weight.data.mul_(1e-3)  # where the first order is all there is
    score = snip(model, [batch])["body.weight"]
    before = model(**batch).loss
    with torch.no_grad():
        model.body.weight[2, 1] = 0.0
    change = (model(**batch).loss - before).abs()
    torch.testing.assert_close(score[2, 1], change.detach(), rtol=2e-2, atol=1e-7)


def test_grasp_against_the_explicit_hessian():
    model, batches = make_model(torch.float64), make_batches(dtype=torch.float64)
    found = grasp(model, batches)
    reference = copy.deepcopy(model).eval()
    params = trainable(reference)
    shapes = {name: param.shape for name, param in params.items()}

    def mean_loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        values = {
            name: part.view(shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        losses = [
            torch.func.functional_call(reference, values, (), batch).loss for batch in batches
        ]
        return torch.stack(losses).mean()

    flat = torch.cat([param.detach().reshape(-1) for param in params.values()])
    hessian = torch.autograd.functional.hessian(mean_loss, flat)
    grad = torch.autograd.functional.jacobian(mean_loss, flat)
    products = (flat * (hessian @ grad)).split([shape.numel() for shape in shapes.values()])
    expected = {
        name: product.view(shape).clamp(min=0)
        for (name, shape), product in zip(shapes.items(), products, strict=True)
    }
    assert_close(found, expected)
    kept = torch.cat([score.reshape(-1) for score in found.values()]) > 0
    assert 0.2 < kept.float().mean() < 0.9


def test_grasp_of_a_linear_loss_is_zero():
    model = nn.Linear(3, 1)
    scores = grasp(model, [torch.ones(2, 3)], loss=lambda model, batch: model(batch).mean())
    assert all(not score.any() for score in scores.values())


def test_synflow_sums_the_paths_through_each_entry():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before = [param.detach().clone() for param in model.parameters()]
    found = synflow(model, lambda model: model(torch.ones(1, 2)))
    first, second = (weight.abs() for weight in before)
    expected = {
        "0.weight": first * second.sum(0)[:, None],
        "2.weight": second * first.sum(1)[None, :],
    }
    assert_close(found, expected)
    for param, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.view(torch.int32), value.view(torch.int32))


SCORES = {
    "fisher": fisher,
    "expect": lambda *args, **more: fisher(*args, sample_type="expect", **more),
    "child_tuning_d": child_tuning_d,
    "snip": snip,
    "grasp": grasp,
    "synflow": lambda model, batches, **more: synflow(
        model, lambda model: model(next(iter(batches))["inputs"]).logits, **more
    ),
}


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


def test_a_tied_weight_is_one_parameter():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    def loss(model, batch):
        return model.b(torch.tanh(model.a(batch))).square().sum()

    torch.manual_seed(0)
    model, batch = Tied(), torch.randn(1, 3)
    (grad,) = torch.autograd.grad(loss(model, batch), [model.a.weight])
    assert_close(fisher(model, [batch], loss=loss), {"a.weight": grad**2})


def test_low_precision_is_accumulated_in_float32():
    model, batches = make_model(torch.bfloat16), make_batches((200,), torch.bfloat16)
    found = fisher(model, batches)
    batches[0]["inputs"] = batches[0]["inputs"].float()
    expected = fisher(model.float(), batches)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=1e-3)


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


@pytest.mark.parametrize(
    ("logits", "message"),
    [(None, "needs a model that returns logits"), ((1, 4, 3), "classes"), ((1, 1), "two classes")],
)
def test_expect_needs_logits_of_classes(logits, message):
    class Odd(nn.Linear):
        def forward(self, inputs):
            out = None if logits is None else super().forward(inputs).sum() * torch.ones(logits)
            return SimpleNamespace(logits=out)

    with pytest.raises(ValueError, match=message):
        fisher(Odd(4, 1), [{"inputs": torch.ones(1, 4)}], sample_type="expect")


@pytest.mark.parametrize("name", ["fisher", "expect", "child_tuning_d", "snip", "grasp"])
def test_a_transformers_encoder(name):
    transformers = pytest.importorskip("transformers", reason="tests a transformers model")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16, num_labels=3, pad_token_id=0,
        )
    ).train()  # fmt: skip
    ids = torch.tensor([[2, 5, 6, 3, 0, 0], [2, 7, 8, 9, 10, 3]])
    batch = transformers.BatchEncoding(
        {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([0, 2])}
    )
    scores = SCORES[name](model, [batch])
    assert scores.keys() == dict(model.named_parameters()).keys()
    word = scores["bert.embeddings.word_embeddings.weight"]
    assert not word[20:].any()
    assert word[5].any()
    assert model.training
    again = SCORES[name](model, [batch])
    assert all(torch.equal(score, again[key]) for key, score in scores.items())
