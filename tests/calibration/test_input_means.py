"""Mean inputs of linear layers against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_optim.calibration.input_means import InputMeans

BATCH, LENGTH, WIDTH = 3, 5, 4


class Encoder(nn.Module):
    """A token-wise layer and a head on the first token, called as transformers models are."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.norm(torch.tanh(self.token(hidden)))[:, 0])


def make(model_type: type[nn.Module] = Encoder) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model, hidden = model_type(), torch.randn(BATCH, LENGTH, WIDTH)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[0, 2:] = 0
    mask[2, 4:] = 0
    return model.train(), hidden, mask


def check(found: dict[str, tuple[Tensor, int]], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, (mean, dim) in found.items():
        assert (mean.dtype, mean.requires_grad, dim) == (torch.float32, False, 1)
        torch.testing.assert_close(mean, expected[name])


def head_input(model: Encoder, hidden: Tensor) -> Tensor:
    return model.norm(torch.tanh(model.token(hidden)))[:, 0].detach()


@pytest.mark.parametrize("how", ["keyword", "position", "bool", "float"])
def test_padded_rows_are_left_out_where_the_shape_tells(how):
    model, hidden, mask = make()
    kind = {"bool": torch.bool, "float": torch.float32}.get(how, torch.int64)
    hidden[0, 3] = torch.nan  # padding may hold anything
    with InputMeans(model) as inputs:
        if how == "position":
            model(hidden, mask)
        else:
            model(hidden, attention_mask=mask.to(kind))
    rows = [hidden[b, i] for b in range(BATCH) for i in range(LENGTH) if mask[b, i]]
    assert len(rows) == 11
    expected = {"token.weight": torch.stack(rows).mean(0)}
    expected["head.weight"] = head_input(model, hidden).mean(0)  # one row a sample: all count
    check(inputs.means, expected)


@pytest.mark.parametrize("mask", [None, torch.ones(BATCH, 1, 1, LENGTH), torch.ones(BATCH, 2)])
def test_all_rows_count_without_a_mask_that_fits(mask):
    model, hidden, _ = make()
    with InputMeans(model) as inputs:
        model(hidden, attention_mask=mask)
    expected = {"token.weight": hidden.reshape(-1, WIDTH).mean(0)}
    check(inputs.means, expected | {"head.weight": head_input(model, hidden).mean(0)})


def test_micro_batches_give_what_their_union_gives():
    model, hidden, mask = make()
    with InputMeans(model) as whole:
        model(hidden, attention_mask=mask)
    with InputMeans(model) as parts:
        for rows in (slice(0, 1), slice(1, 3)):
            model(hidden[rows], attention_mask=mask[rows]).sum().backward()
    check(parts.means, {name: mean for name, (mean, _) in whole.means.items()})


def test_reset_begins_a_new_step_and_remove_ends_recording():
    model, hidden, _ = make()
    inputs = InputMeans(model)
    assert inputs.means == {}
    model(hidden)
    inputs.reset()
    assert inputs.means == {}
    model(2 * hidden)
    torch.testing.assert_close(inputs.means["token.weight"][0], 2 * hidden.mean((0, 1)))
    inputs.remove()
    before = inputs.means["token.weight"][0]
    model(hidden)
    assert torch.equal(inputs.means["token.weight"][0], before)
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_only_training_forwards_of_the_model_are_recorded():
    model, hidden, _ = make()
    with InputMeans(model) as inputs:
        with torch.no_grad():
            model(hidden)
        model.eval()(hidden)
        model.train()
        model.token(hidden)  # not within the model's forward
        assert inputs.means == {}
        with pytest.raises(RuntimeError):
            model(torch.ones(BATCH, LENGTH, WIDTH + 1))
        model.token(hidden)  # nor after one that failed
        assert torch.equal(inputs.means["token.weight"][0], torch.ones(WIDTH + 1))


def test_frozen_weights_are_not_recorded():
    model, hidden, _ = make()
    model.token.weight.requires_grad_(False)
    with InputMeans(model) as inputs:
        model(hidden)
    assert inputs.means.keys() == {"head.weight"}


class Twice(nn.Module):
    """One layer called twice; another whose weight is tied to it, and to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.first.weight
        self.out.weight = self.embed.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.tied(self.first(self.first(hidden)[:, :2])))


def test_every_call_of_a_weight_counts():
    model, hidden, _ = make(Twice)
    with InputMeans(model) as inputs:
        model(hidden)
    second = model.first(hidden)[:, :2]
    third = model.first(second)
    calls = [hidden, second, third]
    rows = torch.cat([call.detach().reshape(-1, WIDTH) for call in calls])
    last = model.first(third).detach().reshape(-1, WIDTH)
    check(inputs.means, {"first.weight": rows.mean(0), "embed.weight": last.mean(0)})


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_no_row_twice(reentrant):
    class Checkpointed(Encoder):
        def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            self.runs = 0

            def part(hidden: Tensor) -> Tensor:
                self.runs += 1
                return self.norm(torch.tanh(self.token(hidden)))

            hidden = checkpoint(part, hidden, use_reentrant=reentrant)
            return self.head(hidden[:, 0])

    model, hidden, mask = make(Checkpointed)
    hidden.requires_grad_()
    plain, _, _ = make()
    with InputMeans(model) as inputs, InputMeans(plain) as expected:
        model(hidden, attention_mask=mask).sum().backward()
        plain(hidden, attention_mask=mask).sum().backward()
    assert model.runs == 2
    check(inputs.means, {name: mean for name, (mean, _) in expected.means.items()})
    assert int(inputs._sums[model.token.weight][1]) == 11


def test_low_precision_is_summed_in_float32():
    model = nn.Linear(1, 1).bfloat16()
    with InputMeans(model) as inputs:
        model(torch.ones(257, 1, dtype=torch.bfloat16))  # bfloat16 has no 257
        model(torch.ones(3, 1, dtype=torch.bfloat16))
    assert inputs.means["weight"][0].tolist() == [1.0]


def test_a_batch_of_padding_alone_has_mean_zero():
    model, hidden, mask = make()
    with InputMeans(model) as inputs:
        model(hidden, attention_mask=torch.zeros_like(mask))
    assert inputs.means["token.weight"][0].tolist() == [0.0] * WIDTH


def test_conv1d_has_its_inputs_in_rows():
    transformers = pytest.importorskip("transformers", reason="Conv1D is of transformers")
    from transformers.pytorch_utils import Conv1D

    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0,
            eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ).train()  # fmt: skip
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, (Conv1D, nn.Linear)):
            hook = lambda _, args, name=name: seen.update({name: args[0].detach()})  # noqa: E731
            module.register_forward_pre_hook(hook)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with InputMeans(model) as inputs:
        model(input_ids=ids, attention_mask=mask)
    means = inputs.means
    tied = means.pop("transformer.wte.weight")  # the output layer, tied to the embeddings
    torch.testing.assert_close(tied[0], seen.pop("lm_head")[mask.bool()].mean(0))
    assert tied[1] == 1
    assert means.keys() == {f"{name}.weight" for name in seen}
    assert len(means) == 4
    for name, rows in seen.items():
        mean, dim = means[f"{name}.weight"]
        torch.testing.assert_close(mean, rows[mask.bool()].mean(0))
        assert dim == 0
        assert model.get_parameter(f"{name}.weight").shape[dim] == mean.numel()


def test_processes_share_their_rows(monkeypatch):
    """Else each would rank by rows of its own, and replicas drift apart."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2), "b": torch.nn.Linear(2, 2)})
    model.forward = lambda x, deep: model["b"](model["a"](x)) if deep else model["a"](x)
    rows = torch.randn(5, 3), torch.randn(2, 3)
    with InputMeans(model) as theirs:  # one that never calls b
        model(rows[1], deep=False)
    with InputMeans(model) as ours:
        model(rows[0], deep=True)
    total, count, _ = theirs._sums[model["a"].weight]
    other = torch.cat([total, count.view(1), torch.zeros(3)]).double()
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda flat: calls.append(flat.add_(other))
    )
    mean, dim = ours.get("a.weight")
    torch.testing.assert_close(mean, torch.cat(rows).mean(0))
    assert dim == 1
    torch.testing.assert_close(ours.get("b.weight")[0], model["a"](rows[0]).mean(0))
    assert ours.get("a.bias") is None
    assert len(calls) == 1
    with torch.no_grad(), monkeypatch.context() as alone:  # what is its own is kept
        alone.setattr(torch.distributed, "is_initialized", lambda: False)
        ours._totals = None
        torch.testing.assert_close(ours.get("a.weight")[0], rows[0].mean(0))
    ours.reset()
    assert ours.get("b.weight") is None
