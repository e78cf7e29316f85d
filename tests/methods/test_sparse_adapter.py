"""SparseAdapter's five scores against their definitions, and the adapters they cannot rank."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from training import active_of

from sparse_optim import methods
from sparse_optim.methods import SPARSE_SCORES

BUDGET = 12
TOKENS = 8  # of synflow's input


class Net(nn.Module):
    """Two layers without biases on a frozen embedding, called as transformers models are."""

    def __init__(self, activation: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4).requires_grad_(False)
        self.down = nn.Linear(4, 6, bias=False)
        self.activation = activation()
        self.up = nn.Linear(6, 3, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> SimpleNamespace:
        logits = self.up(self.activation(self.down(self.embedding(input_ids)))).sum(1)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def make_net(activation: type[nn.Module] = nn.Tanh) -> Net:
    torch.manual_seed(3)
    return Net(activation)


def make_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(9, (5, 3), generator=generator),
        "labels": torch.randint(3, (5,), generator=generator),
    }


def chosen(model: Net, score: str, seed: int = 0) -> set[tuple[str, int]]:
    """What a first step on batch 0 unmasks; batches 1 and 2 are for calibration."""
    optimizer = methods.build(
        "sparse-adapter", model, budget=BUDGET, total_steps=4, sparse_score=score, seed=seed,
        calibration=lambda: [make_batch(1), make_batch(2)],
    )  # fmt: skip
    model(**make_batch(0)).loss.backward()
    optimizer.step()
    return active_of(optimizer)


def top(scores: dict[str, Tensor]) -> set[tuple[str, int]]:
    """The entries of the greatest scores of all tensors together; no two are near the cut."""
    flat = [
        (float(value), name, position)
        for name, score in scores.items()
        for position, value in enumerate(score.detach().flatten())
    ]
    flat.sort(reverse=True)
    assert flat[BUDGET - 1][0] > 1.001 * flat[BUDGET][0]
    return {(name, position) for _, name, position in flat[:BUDGET]}


def trained(model: Net) -> dict[str, Tensor]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def test_rand_is_a_random_mask():
    model = make_net()
    optimizer = methods.build("r-mask", make_net(), budget=BUDGET, total_steps=4, seed=5)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert chosen(model, "rand", seed=5) == active_of(optimizer)
    assert chosen(make_net(), "rand", seed=6) != active_of(optimizer)


def test_mag_keeps_the_greatest_magnitudes():
    model = make_net()
    expected = top({name: param.abs() for name, param in trained(model).items()})
    assert chosen(model, "mag") == expected


def test_snip_is_of_the_first_training_step():
    model, twin = make_net(), make_net()
    twin(**make_batch(0)).loss.backward()
    expected = top({name: (param.grad * param).abs() for name, param in trained(twin).items()})
    assert chosen(model, "snip") == expected


def test_grasp_is_of_the_first_calibration_batch():
    """(H g) theta with the explicit Hessian of the loss, in float64."""
    model = make_net()
    twin = copy.deepcopy(model).double()
    params = trained(twin)
    shapes = [param.shape for param in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        values = dict(zip(params, views, strict=True))
        return torch.func.functional_call(twin, values, (), make_batch(1)).loss

    flat = torch.cat([param.detach().flatten() for param in params.values()])
    grad = torch.autograd.functional.jacobian(loss, flat)
    score = (torch.autograd.functional.hessian(loss, flat) @ grad) * flat
    expected = top(dict(zip(params, score.split([s.numel() for s in shapes]), strict=True)))
    assert chosen(model, "grasp") == expected


def test_synflow_counts_the_paths_through_an_entry():
    """Under |theta| every ReLU is open: the score of an entry is the sum over its paths."""
    model = make_net(nn.ReLU)
    down, up = model.down.weight.abs(), model.up.weight.abs()
    expected = {"down.weight": TOKENS * down * up.sum(0)[:, None]}
    expected["up.weight"] = TOKENS * up * down.sum(1)[None, :]
    assert chosen(model, "synflow") == top(expected)
    tokens = torch.arange(4)
    assert torch.equal(model.embedding(tokens), model.embedding.weight[tokens])


def test_each_score_takes_its_own_entries():
    found = [frozenset(chosen(make_net(nn.ReLU), score)) for score in SPARSE_SCORES]
    assert len(set(found)) == len(SPARSE_SCORES) == 5


def test_pruned_entries_keep_their_value():
    model = make_net()
    before = {name: param.detach().clone() for name, param in trained(model).items()}
    active = chosen(model, "mag")
    for name, param in trained(model).items():
        moved = (param != before[name]).flatten().nonzero().flatten().tolist()
        assert {(name, position) for position in moved} <= active
    assert sum(int((param != 0).sum()) for param in trained(model).values()) == 4 * 6 + 6 * 3


def test_an_unknown_score_lists_the_known_ones():
    with pytest.raises(ValueError, match="'magnitude'; known: rand, mag, snip, grasp, synflow"):
        chosen(make_net(), "magnitude")


def test_a_score_of_gradients_needs_data():
    with pytest.raises(ValueError, match="give calibration="):
        methods.build("sparse-adapter", make_net(), budget=3, sparse_score="grasp")


def test_synflow_says_what_it_needs_of_the_model():
    with pytest.raises(ValueError, match=r"Linear has no get_input_embeddings.*Scores\("):
        methods.build("sparse-adapter", nn.Linear(3, 2), budget=3, sparse_score="synflow")


class Lora(nn.Module):
    """A as random as B is zero, named as peft names them."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.lora_B(self.lora_A(inputs))


@pytest.mark.parametrize("score", sorted(set(SPARSE_SCORES) - {"rand"}))
def test_a_fresh_lora_is_refused_in_words(score):
    model = Lora()
    with pytest.raises(ValueError, match=rf"lora_B.weight is all zeros.*{score}.*Pfeiffer.*id3"):
        methods.build("sparse-adapter", model, budget=3, sparse_score=score)


def test_a_fresh_lora_is_trained_at_random_and_a_trained_one_by_score():
    model = Lora()
    optimizer = methods.build("sparse-adapter", model, budget=16, sparse_score="rand")
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert optimizer.metrics()["active"] == 16
    methods.build("sparse-adapter", model, budget=3, sparse_score="mag")


def test_zero_matrices_outside_an_adapter_are_no_reason():
    """Such as RoBERTa's token types."""
    model = make_net()
    nn.init.zeros_(model.up.weight)
    assert {name for name, _ in chosen(model, "mag")} == {"down.weight"}
