"""Random models and deltas for the tests of the delta file."""

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_optim.delta import Delta, SparseValues
from sparse_optim.delta._fingerprint import fingerprint

INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SPECIAL = [0.0, -0.0, float("nan"), float("inf")]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bit pattern: NaN payloads, infinities and subnormals included."""
    info = torch.iinfo(INTEGER[dtype])
    drawn = torch.randint(info.min, info.max, shape, generator=generator, dtype=INTEGER[dtype])
    return drawn.view(dtype)


def integer_bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(INTEGER[tensor.dtype])


def identical(first: Tensor, second: Tensor) -> bool:
    return (
        first.shape == second.shape
        and first.dtype == second.dtype
        and torch.equal(integer_bits(first), integer_bits(second))
    )


def clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert identical(first[name], second[name]), name


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A base and a tuned model: some entries, from none to all, have other bits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base, tuned = {}, {}
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from(list(INTEGER)))
        before = random_bits(shape, dtype, generator)
        flat = before.view(-1)
        for at in range(0, flat.numel(), 3):
            flat[at] = SPECIAL[at % len(SPECIAL)]
        if before.dim() == 2 and draw(st.booleans()):
            before = before.t().contiguous().t()  # The same values, another order in memory.
        changed = torch.rand(shape, generator=generator) < draw(
            st.sampled_from([0.0, 0.1, 0.3, 1.0])
        )
        flipped = integer_bits(before) ^ torch.iinfo(INTEGER[dtype]).min  # The sign: 0.0 to -0.0.
        other = integer_bits(random_bits(shape, dtype, generator))
        replaced = torch.where(torch.rand(shape, generator=generator) < 0.5, flipped, other)
        base[f"layer.{index}"] = before
        tuned[f"layer.{index}"] = torch.where(changed, replaced, integer_bits(before)).view(dtype)
    return base, tuned


def example_base(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a.weight": (8, 6), "b.weight": (5, 4, 3), "c.bias": (7,)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


def example_delta(base: dict[str, Tensor], entries: int = 6, seed: int = 2) -> Delta:
    """`entries` changed in each tensor of `base`, with unmask steps, originals and a head."""
    generator = torch.Generator().manual_seed(seed)
    sparse = {}
    for name, tensor in base.items():
        position = torch.randperm(tensor.numel(), generator=generator)[:entries].sort().values
        sparse[name] = SparseValues(
            shape=tuple(tensor.shape),
            dtype=tensor.dtype,
            position=position,
            value=torch.randn(entries, generator=generator).to(tensor.dtype),
            unmask_step=torch.randint(1, 4, (entries,), generator=generator, dtype=torch.int32),
            original=tensor.reshape(-1)[position],
        )
    return Delta(
        sparse=sparse,
        dense={"head.weight": torch.randn(2, 4, generator=generator)},
        fingerprints={name: fingerprint(tensor) for name, tensor in base.items()},
        method={"name": "id3", "budget": entries * len(base), "betas": (0.9, 0.999)},
    )


def with_head(base):
    return base | {"head.weight": torch.full((2, 4), 9.0)}


def sparse_values(**changes):
    arguments = {
        "shape": (4,),
        "dtype": torch.float32,
        "position": torch.tensor([1, 3]),
        "value": torch.tensor([1.0, 2.0]),
    }
    return SparseValues(**(arguments | changes))


def delta_of(name, values, tensor, **changes):
    return Delta(sparse={name: values}, fingerprints={name: fingerprint(tensor)}, **changes)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 4)
        self.norm = nn.BatchNorm1d(4)
        self.output = nn.Linear(4, 30, bias=False)
        self.output.weight = self.embedding.weight


def tied_pair():
    torch.manual_seed(0)
    base, tuned = Tied(), Tied()
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.embedding.weight[3] += 1
        tuned.norm.weight += 1
        tuned.norm.num_batches_tracked += 5
    return base, tuned
