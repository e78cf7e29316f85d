"""Importance x selection against a brute force that knows neither tiles nor sparse state.

What planted faults were seen by: moments of entries that left kept (test_replaced_sets), the step
left out of the noise (test_a_fresh_sample_at_each_step), |param| descending (test_magnitude).
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from op_cases import DTYPES, assert_same_bits, random_values
from torch import Tensor
from torch.nn import Parameter
from training import active_of, everything, give_grads, new_params, snapshot

from sparse_optim import (
    D3,
    ActivationWeightGradient,
    Increment,
    Magnitude,
    MaskedAdamW,
    Random,
    Repeat,
    Scores,
    Snip,
    Static,
    Stochastic,
)
from sparse_optim.backends.noise import noise

SHAPES = ((20, 30), (0,), (1,), (99,), (513,))
LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1
MEANS = {"group0.param0": (torch.linspace(-1, 2, 30), 1)}


def weigh(name: str, param: Tensor, grad: Tensor) -> Tensor:
    """An importance of a user's own."""
    return grad.float().square() + param.float().abs()


IMPORTANCES = {
    "d3": D3(0.0),
    "d3-2": D3(2.0, 0.5),
    "d3-minus": D3(-1.0, 0.5),
    "magnitude": Magnitude(),
    "snip": Snip(),
    "mu": ActivationWeightGradient(MEANS),
    "own": weigh,
}


def score_of(kind: str, name: str, param: Tensor, grad: Tensor) -> Tensor:
    """The definitions of METHODS, written once more, in float64 (float32 where ties decide)."""
    theta, g = param.detach().double(), grad.double()
    match kind:
        case "d3":
            return g.abs()
        case "d3-2":
            return g.abs() / (theta.abs() + 0.5) ** 2
        case "d3-minus":
            return g.abs() * (theta.abs() + 0.5)
        case "magnitude":
            return 1e9 - theta.abs()
        case "snip":
            return (g * theta).abs()
        case "mu":
            mu = MEANS[name][0].double().abs() if name in MEANS else 1.0
            return (g * theta).abs() * mu
    return g.square() + theta.abs()


class Brute:
    """One AdamW per entry, in float64, dense; entries outside the step's set have no state."""

    def __init__(self, params: list[Parameter], replaces: bool, budget: int) -> None:
        self.values = torch.cat([param.detach().double().view(-1) for param in params])
        self.exp_avg, self.exp_avg_sq, self.age = (torch.zeros_like(self.values) for _ in range(3))
        self.active = torch.zeros_like(self.values, dtype=torch.bool)
        self.touched = self.active.clone()
        self.replaces, self.budget = replaces, budget

    def step(self, score: Tensor, grad: Tensor) -> None:
        before = self.active
        if self.replaces:
            self.active = torch.zeros_like(before)
        wanted = self.budget - int(self.active.sum())
        candidates = score.masked_fill(self.active, 0)
        order = candidates.argsort(descending=True, stable=True)[:wanted]
        self.active[order[candidates[order] > 0]] = True
        self.touched |= self.active
        for state in (self.exp_avg, self.exp_avg_sq, self.age):
            state[~(self.active & before)] = 0
        on = self.active.double()
        self.age += on
        self.values *= 1 - LR * DECAY * on
        self.exp_avg += on * (1 - BETAS[0]) * (grad - self.exp_avg)
        self.exp_avg_sq += on * (1 - BETAS[1]) * (grad**2 - self.exp_avg_sq)
        correction1 = 1 - BETAS[0] ** self.age.clamp(min=1)
        correction2 = (1 - BETAS[1] ** self.age.clamp(min=1)).sqrt()
        move = self.exp_avg / correction1 / (self.exp_avg_sq.sqrt() / correction2 + EPS)
        self.values -= LR * on * move


def assert_matches_brute(kind: str, selection: Static, backend: str, steps: int = 6) -> None:
    params = new_params(*SHAPES, seed=4)
    optimizer = MaskedAdamW(
        params, LR, BETAS, EPS, DECAY, importance=IMPORTANCES[kind], selection=selection,
        backend=backend,
    )  # fmt: skip
    brute = Brute(params, selection.replaces, selection.budget)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        give_grads(params, "normal", generator)
        # Rank by what the optimizer holds, so that a rounding does not move the cut.
        score = torch.cat([
            score_of(kind, name, param, param.grad).view(-1)
            for name, param in zip(optimizer.engine.pool.names, params, strict=True)
        ])  # fmt: skip
        if isinstance(selection, Stochastic):
            energy = [
                noise(selection.seed, step, index, param.numel(), param.device)
                for index, param in enumerate(params)
            ]
            score = score / torch.cat(energy).double().sqrt()
        optimizer.step()
        brute.step(score, torch.cat([param.grad.double().view(-1) for param in params]))
        flags = torch.zeros_like(brute.active)
        flags[optimizer.engine.active.global_index(torch.tensor([p.numel() for p in params]))] = (
            True
        )
        assert torch.equal(flags, brute.active), f"step {step}"
    values = torch.cat([param.detach().view(-1) for param in params])
    torch.testing.assert_close(values.double(), brute.values, rtol=1e-5, atol=1e-6)
    untouched = torch.cat([p.view(-1) for p in new_params(*SHAPES, seed=4)])[~brute.touched]
    assert_same_bits(values[~brute.touched], untouched.detach())
    moved = optimizer.delta(_named(params, optimizer.engine.pool.names)).sparse
    count = int(brute.touched.sum())
    assert sum(entry.num_entries for entry in moved.values()) == count
    assert optimizer.metrics().get("touched", count) == count


def _named(params: list[Parameter], names: list[str]) -> torch.nn.Module:
    """A module whose parameters have the optimizer's names."""
    module = torch.nn.Module()
    module.group0 = torch.nn.Module()
    for name, param in zip(names, params, strict=True):
        module.group0.register_parameter(name.removeprefix("group0."), param)
    return module


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_static_sets(kind, backend):
    assert_matches_brute(kind, Static(150), backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", IMPORTANCES)
def test_replaced_sets(kind, backend):
    assert_matches_brute(kind, Repeat(150), backend)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", sorted(set(IMPORTANCES) - {"magnitude"}))
def test_sampled_sets(kind, backend):
    assert_matches_brute(kind, Stochastic(150, seed=-3), backend)


def test_magnitude():
    """Zeros first, then the smallest, ties by position, in every dtype; never NaN or infinity."""
    for dtype in DTYPES:
        values = [0.5, math.nan, -0.25, 0.0, math.inf, 0.25, -0.0, 1e-5]
        param = Parameter(torch.tensor(values, dtype=dtype))
        optimizer = MaskedAdamW([param], importance=Magnitude(), selection=Static(5))
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert [position for _, position in sorted(active_of(optimizer))] == [2, 3, 5, 6, 7]


def test_scores_that_are_all_zero_warn():
    """SNIP on a fresh LoRA: B is zero, so that A's gradient is zero, too."""
    a, b = Parameter(torch.randn(2, 4)), Parameter(torch.zeros(3, 2))
    optimizer = MaskedAdamW([a, b], importance=Snip(), selection=Static(4))
    (torch.ones(5, 4) @ a.t() @ b.t()).sum().backward()
    with pytest.warns(UserWarning, match="Snip.* scores every entry 0"):
        optimizer.step()
    assert optimizer.metrics()["active"] == 0


def test_magnitude_is_no_weight():
    with pytest.raises(ValueError, match="an order, not weights"):
        MaskedAdamW(new_params((9,)), importance=Magnitude(), selection=Stochastic(3))


def test_magnitude_warns_of_a_fresh_lora():
    values = {"lora_A": torch.randn(4, 8), "lora_B": torch.zeros(8, 4), "bias": torch.zeros(3)}
    params = [(name, Parameter(value)) for name, value in values.items()]
    optimizer = MaskedAdamW(params, importance=Magnitude(), selection=Static(5))
    for _, param in params:
        param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match=r"1 of the ranked matrices are .*lora_B\)"):
        optimizer.step()


@pytest.mark.parametrize("selection", [Static, Repeat])
def test_random_masks(selection):
    """R-Mask and random tuning: every entry equally often, the seed decides, the gradient not."""
    hits = torch.zeros(200)
    for seed in range(60):
        masks = []
        for scale in (1.0, 100.0):
            param = Parameter(torch.randn(200))
            optimizer = MaskedAdamW([param], importance=Random(seed), selection=selection(20))
            for _ in range(5):
                param.grad = scale * torch.randn(200)
                optimizer.step()
            (positions,) = optimizer.active_entries().values()
            masks.append(positions)
        assert torch.equal(*masks)
        hits[masks[0]] += 1
    assert int(hits.sum()) == 60 * 20
    assert hits.max() <= 18  # binomial(60, 0.1): 6 on average, 18 about once in 60,000 entries
    assert (hits > 0).float().mean() > 0.98


def test_a_fresh_sample_at_each_step():
    param = Parameter(torch.randn(1000))
    optimizer = MaskedAdamW([param], importance=D3(), selection=Stochastic(100, seed=1))
    param.grad = torch.ones(1000)
    sets = []
    for _ in range(3):
        optimizer.step()
        sets.append(active_of(optimizer))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0 < len(sets[one] & sets[other]) < 40  # 10 on average
    assert optimizer.metrics()["active"] == 100


def test_masks_and_scores():
    """A mask is taken as it is; parameters without scores stay frozen; a shortfall is final."""
    params = [("a", Parameter(torch.randn(4, 3))), ("b", Parameter(torch.randn(5)))]
    mask = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    optimizer = MaskedAdamW(params, importance=Scores({"a": mask}), selection=Static(6))
    for _ in range(3):
        for _, param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
        assert active_of(optimizer) == {("a", 0), ("a", 4), ("a", 5), ("a", 11)}


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({"a": torch.tensor([1.0, -1.0])}, "a is negative or not finite"),
        ({"a": torch.tensor([1.0, math.nan])}, "a is negative or not finite"),
        ({"b": torch.ones(2)}, "b is no parameter of the pool"),
        ({"a": torch.ones(3)}, r"a has shape \(2,\), its scores \(3,\)"),
    ],
)
def test_wrong_scores_are_refused(scores, message):
    param = Parameter(torch.randn(2))
    param.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        MaskedAdamW([("a", param)], importance=Scores(scores), selection=Static(1)).step()


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda name, param, grad: grad - 5, ValueError, "group0.param0 is negative or not finite"),
        (lambda name, param, grad: grad[1:], ValueError, r"must have shape \(3,\)"),
        (lambda name, param, grad: grad.double(), TypeError, "is torch.float64"),
        (lambda name, param, grad: 1.0, TypeError, "must be a tensor, got float"),
    ],
)
@pytest.mark.parametrize("selection", [Increment(2, 4), Static(2), Repeat(2), Stochastic(2)])
def test_a_wrong_importance_changes_nothing(selection, answer, error, message):
    """The step fails in words, and the optimizer and the model are what they were."""
    good = True
    param = Parameter(torch.randn(3))
    optimizer = MaskedAdamW(
        [param], importance=lambda *args: args[2].abs() if good else answer(*args),
        selection=selection,
    )  # fmt: skip
    param.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    before = everything(optimizer)
    good = isinstance(selection, Static) and not selection.replaces  # no scores are asked for
    if good:
        return
    with pytest.raises(error, match=message):
        optimizer.step()
    for got, expected in zip(everything(optimizer), before, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("importance", [D3(), Snip(), Random(3)])
@pytest.mark.parametrize("selection", [Repeat(60), Stochastic(60, seed=2)])
def test_a_skipped_step_keeps_the_set(selection, importance):
    params = new_params(*SHAPES)
    optimizer = MaskedAdamW(params, importance=importance, selection=selection)
    generator = torch.Generator().manual_seed(0)
    give_grads(params, "normal", generator)
    optimizer.step()
    before = everything(optimizer)
    give_grads(params, "normal", generator)
    params[0].grad[3, 3] = math.nan
    optimizer.step()
    for got, expected in zip(everything(optimizer), before, strict=True):
        assert_same_bits(got, expected)
    assert optimizer.metrics()["skipped_steps"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("importance", "selection"),
    [
        (D3(1.0), Repeat(80)),
        (D3(), Stochastic(80, seed=9)),
        (Magnitude(), Static(80)),
        (Random(1), Repeat(80)),
        (Snip(), Increment(80, 12)),
    ],
)
def test_resume(importance, selection, dtype, tmp_path):
    """Stopped after five of nine steps and loaded elsewhere: the same bits, and the same delta."""

    def build() -> tuple[list[Parameter], MaskedAdamW]:
        params = new_params(*SHAPES, dtype=dtype)
        return params, MaskedAdamW(params, importance=importance, selection=selection)

    def train(params: list[Parameter], optimizer: MaskedAdamW, steps: range) -> None:
        for step in steps:
            give_grads(params, "normal", torch.Generator().manual_seed(step))
            optimizer.step()

    params, optimizer = build()
    train(params, optimizer, range(5))
    torch.save((snapshot(params), optimizer.state_dict()), tmp_path / "checkpoint")
    twin = copy.deepcopy((params, optimizer))
    train(params, optimizer, range(5, 9))

    other, resumed = build()
    values, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    with torch.no_grad():
        for param, value in zip(other, values, strict=True):
            param.copy_(value)
    resumed.load_state_dict(state)
    train(other, resumed, range(5, 9))
    train(*twin, range(5, 9))
    for later, again in ((other, resumed), twin):
        for got, expected in zip(later, params, strict=True):
            assert_same_bits(got, expected)
        assert torch.equal(again.engine.touched.index(), optimizer.engine.touched.index())
        assert active_of(again) == active_of(optimizer)


def test_a_checkpoint_of_another_selection_is_refused():
    state = MaskedAdamW(new_params((9,)), importance=D3(), selection=Repeat(3)).state_dict()
    other = MaskedAdamW(new_params((9,)), importance=D3(), selection=Static(3))
    with pytest.raises(ValueError, match="selection is of another kind"):
        other.load_state_dict(state)


def test_missing_gradients_are_no_candidates():
    """Even for importances that need no gradient: such an entry could not move."""
    params = new_params((50,), (60,))
    optimizer = MaskedAdamW(params, importance=Magnitude(), selection=Static(40))
    params[1].grad = torch.ones(60)
    optimizer.step()
    assert {name for name, _ in active_of(optimizer)} == {"group0.param1"}


@pytest.mark.parametrize("kind", ["ties", "rows"])
def test_backends_agree_on_samples(kind):
    """Ties and many scales, bfloat16 and float32 together, many tiles."""
    found = []
    for backend in ("reference", "cpp"):
        generator = torch.Generator().manual_seed(3)
        params = new_params((30_000,), seed=1) + new_params((70, 200), dtype=torch.bfloat16)
        optimizer = MaskedAdamW(
            params, importance=Snip(), selection=Stochastic(900, seed=5), backend=backend
        )
        for param in params:
            grad = random_values(param.numel(), param.dtype, kind, generator)
            param.grad = grad.view(param.shape)
        optimizer.step()
        found.append(active_of(optimizer))
    assert found[0] == found[1]
    assert len(found[0]) == 900
