"""The registry: what each method trains, on a small model, and what it says of wrong input."""

from __future__ import annotations

import pytest
import torch
from repository import ROOT
from torch import Tensor, nn
from training import active_of

from sparse_optim import IncrementalMaskedAdamW, MaskedAdamW, methods
from sparse_optim.methods import METHODS


class Model(nn.Module):
    """An encoder with attention, biases and norms, and a classifier on top."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.Linear(8, 8, bias=bias)
        self.dense = nn.Linear(8, 8, bias=bias)
        self.norm = nn.LayerNorm(8, bias=bias)
        self.classifier = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        hidden = self.norm(self.dense(torch.tanh(self.attention(hidden))) + hidden)
        kept = (hidden * attention_mask.unsqueeze(-1)).sum(1)
        return nn.functional.cross_entropy(self.classifier(kept), labels)


def make_batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(6, 5, dtype=torch.int64)
    mask[::2, 3:] = 0
    return {
        "input_ids": torch.randint(0, 11, (6, 5), generator=generator),
        "labels": torch.randint(0, 3, (6,), generator=generator),
        "attention_mask": mask,
    }


class Output:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class WithLoss(Model):
    """As transformers' models: the loss is an attribute of what forward returns."""

    def forward(self, **batch: Tensor) -> Output:
        return Output(super().forward(**batch))


CALIBRATED = ("fish", "child-tuning-d", "gem", "shira-grad", "shira-snip", "super")


def build(name: str, model: nn.Module, **options: object) -> torch.optim.Optimizer:
    options = {"fresh": ["classifier"], "total_steps": 4, "rank": "all"} | options
    if METHODS[name].budget == "given":
        options.setdefault("budget", 40)
    if name in CALIBRATED:
        options.setdefault("calibration", lambda: [make_batch(9), make_batch(10)])
    return methods.build(name, model, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for step in range(steps):
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (param != before[name]) for name, param in model.state_dict().items()}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_entries_and_the_head(name):
    torch.manual_seed(0)
    model = WithLoss()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build(name, model)
    train(model, optimizer)
    changed = moved(model, before)
    assert changed.pop("classifier.weight").any()
    changed.pop("classifier.bias")
    count = sum(int(mask.sum()) for mask in changed.values())
    biases = 3 * 8
    match METHODS[name].budget, name:
        case "given", "dps" | "dps-mix":
            assert count > 200  # dense windows
        case "given", "repeat-d3":
            assert 40 < count <= 160
            assert optimizer.metrics()["active"] == 40
        case "given", _:
            assert optimizer.metrics()["active"] == 40
            assert 30 <= count <= 40  # some gradients are zero (words that no batch holds)
        case "biases", _:
            assert optimizer.metrics()["active"] == biases
            assert biases - 8 < count <= 4 * biases
        case _, "full":
            assert count > 200  # of 248
        case _, "frozen":
            assert count == 0
        case _, "bitfit":
            assert {key for key, mask in changed.items() if mask.any()} == {
                "attention.bias", "dense.bias", "norm.bias",
            }  # fmt: skip
        case _, "multi-head":
            assert {key for key, mask in changed.items() if mask.any()} == {
                "attention.weight", "attention.bias",
            }  # fmt: skip


def test_what_each_method_is_made_of():
    """Importance and selection by name: the registry's half of the definitions in `methods`."""
    expected = {
        "id3": ("D3", "Increment"),
        "static-d3": ("D3", "Static"),
        "repeat-d3": ("D3", "Repeat"),
        "pafi": ("Magnitude", "Static"),
        "fish": ("Scores", "Static"),
        "child-tuning-d": ("Scores", "Static"),
        "r-mask": ("Random", "Static"),
        "random-tuning": ("Random", "Repeat"),
        "sparse-adapter": ("Snip", "Static"),
        "stochastic-tuning": ("ActivationWeightGradient", "Stochastic"),
        "top-tuning": ("ActivationWeightGradient", "Repeat"),
        **dict.fromkeys(
            ("lift", "gem", "shira", "shira-grad", "shira-snip", "super"),
            ("Scores", "Static"),
        ),
    }
    built = {name: build(name, WithLoss()) for name in METHODS}
    assert {
        name: (type(optimizer.importance).__name__, type(optimizer.selection).__name__)
        for name, optimizer in built.items()
        if isinstance(optimizer, MaskedAdamW)
    } == expected
    for name in ("stochastic-tuning", "top-tuning", "random-tuning"):
        assert {group["eps"] for group in built[name].param_groups} == {1e-6}


@pytest.mark.parametrize("sampled", [False, True])
def test_id3_means_the_same_by_name_and_by_class(sampled):
    """One default: the importance, when the budget is spent, and how often entries are unmasked."""
    model, other = WithLoss(), WithLoss()
    options = {"budget": 40, "total_steps": 100, "sampled_backward": sampled, "max_grad_norm": 1.0}
    by_name = build("id3", model, **options)
    by_class = IncrementalMaskedAdamW(other.named_parameters(), model=other, **options)
    assert by_name.selection == by_class.selection
    assert by_name.importance == by_class.importance
    assert by_class.selection.every == (5 if sampled else 1)
    targets = by_class.selection.targets(40).tolist()
    assert (targets[10], targets[20:]) == (20, [40] * 81)  # spent in the first fifth
    paper = {"unmask_steps": 1.0, "every": 1}
    other = IncrementalMaskedAdamW(
        WithLoss().named_parameters(), budget=40, total_steps=80, **paper
    )
    assert other.selection.targets(40).tolist() == [t // 2 for t in range(81)]


def test_fish_takes_the_greatest_sums_of_squares():
    """Per-sample gradients of the calibration data, by hand."""
    torch.manual_seed(1)
    model = WithLoss()
    optimizer = build("fish", model)
    squares = {name: torch.zeros_like(param) for name, param in model.named_parameters()}
    for batch in (make_batch(9), make_batch(10)):
        for row in range(6):
            model.zero_grad()
            model(**{key: value[row : row + 1] for key, value in batch.items()}).loss.backward()
            for name, param in model.named_parameters():
                squares[name] += param.grad**2
    model.zero_grad()
    flat = [
        (float(value), name, index)
        for name, square in squares.items()
        if not name.startswith("classifier")
        for index, value in enumerate(square.view(-1))
    ]
    train(model, optimizer, steps=1)
    assert active_of(optimizer) == {(name, i) for _, name, i in sorted(flat, reverse=True)[:40]}


def test_stochastic_tuning_sees_the_means_of_each_step():
    """|mu param grad| with mu over unpadded rows of this batch alone; entries by its top."""
    torch.manual_seed(2)
    model = WithLoss()
    optimizer = build("top-tuning", model, budget=30, lr=0.0)
    train(model, optimizer, steps=2)
    batch = make_batch(7)
    inputs = {}
    for layer in ("attention", "dense"):
        getattr(model, layer).register_forward_hook(
            lambda module, args, output, layer=layer: inputs.update({layer: args[0].detach()})
        )
    model(**batch).loss.backward()
    keep = batch["attention_mask"].bool()
    scores = []
    for name, param in model.named_parameters():
        if name.startswith("classifier"):
            continue
        mu = inputs[name.split(".")[0]][keep].mean(0) if name.endswith("e.weight") else 1.0
        mu = inputs["attention"][keep].mean(0) if name == "attention.weight" else mu
        score = (mu * param * param.grad).abs().detach()
        scores += [(float(value), name, i) for i, value in enumerate(score.view(-1))]
    optimizer.step()
    best = {(name, i) for _, name, i in sorted(scores, reverse=True)[:30]}
    assert len(best ^ active_of(optimizer)) <= 2  # sums of the means round differently


def test_param_groups_by_rate_and_decay():
    model = WithLoss()
    optimizer = methods.build(
        "id3", model, fresh=["classifier"], rank="all", lr=1e-3, head_lr=2e-3,
        weight_decay=0.1, budget=5,
        no_decay=frozenset(name for name, param in model.named_parameters() if param.ndim < 2),
    )  # fmt: skip
    seen = {
        (group["unmask"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups
    }
    assert seen == {("rank", 1e-3, 0.1), ("rank", 1e-3, 0), ("all", 2e-3, 0.1), ("all", 2e-3, 0)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pafi", {"budget": None}, "needs a budget"),
        ("pafi", {"budget": 10**6}, "budget must be 1 to"),
        ("fish", {"calibration": None}, "before the first step: give calibration="),
        ("frozen", {"fresh": []}, "trains only a fresh head"),
        (
            "id3",
            {"fresh": [""]},
            "pool is empty: rank='all' leaves no parameter that is not fresh.*method 'full'",
        ),
    ],
)
def test_what_a_method_lacks_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, WithLoss(), **options)


@pytest.mark.parametrize("name", ["id3", "full"])
def test_a_frozen_model_is_told(name):
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        build(name, WithLoss().requires_grad_(False))


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown method 'id4'; known: id3, static-d3"):
        methods.build("id4", WithLoss())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitfit", "no parameter's name ends in 'bias'"),
        ("stochastic-tuning", "no biases, which set the default budget"),
        ("multi-head", "no parameter's name contains 'attention'"),
    ],
)
def test_models_without_the_parts(name, message):
    model = WithLoss(bias=False)
    model.attention = nn.Identity()
    with pytest.raises(ValueError, match=message):
        build(name, model)


def test_too_little_calibration_data_warns():
    row = {key: value[:1] for key, value in make_batch(9).items()}  # three words of eleven
    with pytest.warns(UserWarning, match="entries score above zero, the budget is 240"):
        build("fish", WithLoss(), budget=240, calibration=lambda: [row])


def test_the_docs_name_every_method():
    table = (ROOT / "docs" / "methods.md").read_text()
    missing = [name for name in METHODS if f"`{name}`" not in table]
    assert not missing
