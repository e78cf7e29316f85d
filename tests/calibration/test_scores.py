"""Calibration scores against brute force."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from calibration_cases import (
    CLASSES,
    SCORES,
    assert_close,
    gradient,
    make_batches,
    make_model,
    trainable,
)
from torch import Tensor, nn

from sparse_optim.calibration import child_tuning_d, fisher, grasp, snip, synflow


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
