"""Fused, transposed and interleaved memory: entries go where a dense copy would put them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from delta_cases import identical, integer_bits, random_bits
from publish_cases import whole_patch
from torch import Tensor, nn

from sparse_optim.publish import WeightReceiver, runtime_views

MODELS, LAYOUTS = 100, 100  # of each model


def random_layout(rng: random.Random) -> tuple[Tensor, list[Tensor]]:
    """Memory of a model, and disjoint views of it in which tensors of a checkpoint lie."""
    dtype = rng.choice([torch.float32, torch.bfloat16])
    sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
    entries = math.prod(sizes)
    memory = torch.zeros(entries + rng.randint(0, 3), dtype=dtype)
    whole = memory[:entries].view(sizes).permute(rng.sample(range(len(sizes)), len(sizes)))
    if rng.random() < 0.3:
        whole = whole.unsqueeze(rng.randint(0, whole.dim()))
    dim = rng.randrange(whole.dim())
    count = rng.randint(1, whole.shape[dim])
    if rng.random() < 0.5:  # parts one after the other
        return memory, list(whole.tensor_split(count, dim))
    before = (slice(None),) * dim
    return memory, [whole[(*before, slice(start, None, count))] for start in range(count)]


@pytest.mark.parametrize("seed", range(MODELS))
def test_ten_thousand_random_layouts(seed: int):
    """Against a copy of the whole tensor into the view."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    memories, expected, views, base, changes = [], [], {}, {}, {}
    for number in range(LAYOUTS):
        memory, parts = random_layout(rng)
        memory.copy_(random_bits(tuple(memory.shape), memory.dtype, generator))
        oracle = memory.clone()
        for part, view in enumerate(parts):
            name = f"{number}.{part}"
            views[name], base[name] = view, view.contiguous().clone()
            chosen = torch.rand(view.numel(), generator=generator) < rng.choice([0.2, 0.9])
            position = chosen.nonzero().view(-1)
            value = random_bits((position.numel(),), view.dtype, generator)
            changes[name] = position, value
            after = base[name].clone(memory_format=torch.contiguous_format)
            after.view(-1)[position] = value
            target = oracle.as_strided(view.shape, view.stride(), view.storage_offset())
            integer_bits(target).copy_(integer_bits(after))
        memories.append(memory)
        expected.append(oracle)
    before = [memory.clone() for memory in memories]
    receiver = WeightReceiver(views)
    receiver.receive(whole_patch(1, base, changes))
    assert all(map(identical, memories, expected))
    receiver.verify()
    receiver.reset()
    assert all(map(identical, memories, before))


class Fused(nn.Module):
    """Attention and MLP as inference servers keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(6, 8 + 4 + 4)  # grouped queries: k and v are smaller
        self.gate_up_proj = nn.Linear(6, 10, bias=False)
        self.down_proj = nn.Linear(5, 6)


SHAPES = {
    "layers.0.q_proj.weight": (8, 6), "layers.0.k_proj.weight": (4, 6),
    "layers.0.v_proj.weight": (4, 6), "layers.0.q_proj.bias": (8,),
    "layers.0.k_proj.bias": (4,), "layers.0.v_proj.bias": (4,),
    "layers.0.gate_proj.weight": (5, 6), "layers.0.up_proj.weight": (5, 6),
    "layers.0.down_proj.weight": (6, 5), "layers.0.down_proj.bias": (6,),
}  # fmt: skip
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.mark.parametrize("transposed", [(), ("qkv_proj", "down_proj")])
def test_fused_and_transposed_modules(transposed: tuple[str, ...]):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Fused()])})
    plain = {name: torch.randn(shape) for name, shape in SHAPES.items()}

    def turned(name: str, tensor: Tensor) -> Tensor:
        return tensor.t().contiguous() if name in transposed else tensor

    def fill(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        state = {}
        for kind in ("weight", "bias"):
            for fused, parts in {**PACKED, "down_proj": ["down_proj"]}.items():
                found = [tensors.get(f"layers.0.{part}.{kind}") for part in parts]
                if found[0] is not None:
                    state[f"layers.0.{fused}.{kind}"] = turned(fused, torch.cat(found))
        return state

    layer = model["layers"][0]
    for name in transposed:
        module = getattr(layer, name)
        module.weight = nn.Parameter(module.weight.detach().t().contiguous())
    model.load_state_dict(fill(plain))
    receiver = WeightReceiver(runtime_views(model, SHAPES, PACKED, transposed))
    changes, tuned = {}, {}
    for name, tensor in plain.items():
        tuned[name] = torch.where(torch.rand(tensor.shape) < 0.4, tensor + 1, tensor)
        position = (tuned[name] != tensor).view(-1).nonzero().view(-1)
        changes[name] = (position, tuned[name].view(-1)[position])
    receiver.receive(whole_patch(1, plain, changes))
    for name, expected in fill(tuned).items():
        assert torch.equal(model.state_dict()[name], expected), name
    receiver.reset()
    for name, expected in fill(plain).items():
        assert torch.equal(model.state_dict()[name], expected), name


def test_what_does_not_fit_a_fused_tensor():
    model = {"a.qkv.weight": torch.zeros(9, 2)}
    shapes = {"a.q.weight": (4, 2), "a.k.weight": (4, 2)}
    with pytest.raises(ValueError, match=r"'a.qkv.weight' has 9 rows, its parts \[4, 4\] together"):
        runtime_views(model, shapes, {"qkv": ["q", "k"]})
    assert runtime_views({"b": torch.zeros(2)}, shapes, {"qkv": ["q", "k"]}) == {}
    with pytest.raises(TypeError, match=r"qkv: expected several names, got 'qk': write \('qk',\)"):
        runtime_views(model, shapes, {"qkv": "qk"})
    with pytest.raises(TypeError, match="transposed: expected several names, got 'qkv'"):
        runtime_views(model, shapes, {"qkv": ["q", "k"]}, "qkv")
    with pytest.raises(ValueError, match=r"transposed: 'c\.weight' has 3 dimensions"):
        runtime_views({"c.weight": torch.zeros(2, 2, 2)}, {"c.weight": (2, 2, 2)}, {}, ["c"])


def test_views_of_interleaved_heads():
    """GPT-NeoX: query, key and value of each head side by side."""
    heads, width, hidden = 3, 2, 6
    fused = torch.randn(heads * 3 * width, hidden)
    view = fused.view(heads, 3, width, hidden)
    plain = {
        name: view[:, i].reshape(heads * width, hidden).clone() for i, name in enumerate("qkv")
    }
    receiver = WeightReceiver({name: view[:, i] for i, name in enumerate("qkv")})
    position = torch.tensor([0, 7, 35])
    receiver.receive(whole_patch(1, plain, {"k": (position, torch.ones(3))}))
    plain["k"].view(-1)[position] = 1.0
    for index, name in enumerate("qkv"):
        assert torch.equal(view[:, index].reshape(heads * width, hidden), plain[name])
