"""Shapes of three encoders, and gradients that look like theirs, without downloading anything.

What matters to a step is how many entries and tensors there are and how gradients are spread: most
rows of the word embedding are zero (tokens that the batch does not hold), and gradient scales
differ between tensors by an order of magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, ...]

ZERO_ROWS = 0.9  # share of the word embedding's rows without gradient
LOG_SCALE_MEAN, LOG_SCALE_STD = -9.0, 1.0  # of the gradient scale of a tensor, log-normal
WEIGHT_STD, VECTOR_STD = 0.04, 0.5  # of parameters: matrices; biases and norms


def encoder(
    embeddings: list[Shape], hidden: int, intermediate: int, layers: int, head: list[Shape]
) -> list[Shape]:
    """Shapes of a BERT-like encoder in the order of its parameters, word embedding first."""
    vector = (hidden,)
    attention = [(hidden, hidden), vector] * 4 + [vector, vector]
    feed_forward = [(intermediate, hidden), (intermediate,), (hidden, intermediate)] + [vector] * 3
    return [*embeddings, vector, vector, *(attention + feed_forward) * layers, *head]


def _head(hidden: int) -> list[Shape]:
    """Pooler and a classifier with two classes."""
    return [(hidden, hidden), (hidden,), (2, hidden), (2,)]


MODELS: dict[str, list[Shape]] = {
    "tiny": encoder([(1000, 64), (32, 64), (2, 64)], 64, 256, 2, _head(64)),  # for tests
    "MiniLM": encoder([(30522, 384), (512, 384), (2, 384)], 384, 1536, 6, _head(384)),
    "BERT-base": encoder([(30522, 768), (512, 768), (2, 768)], 768, 3072, 12, _head(768)),
    "DeBERTa-base": encoder(
        [(128100, 768)], 768, 3072, 12, [(512, 768), (768,), (768,), *_head(768)]
    ),
}

MEASURED = ("MiniLM", "BERT-base", "DeBERTa-base")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def num_entries(shapes: list[Shape]) -> int:
    """Entries of all tensors together."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def make_params(shapes: list[Shape], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Parameters with `.grad` set; the same for the same seed.

    Args:
        shapes: of the tensors; rows of the first without gradient are drawn.
        dtype: of parameters and gradients; values are drawn in float32 and rounded.
        seed: of all draws.
    """
    generator = torch.Generator().manual_seed(seed)
    params: list[Tensor] = []
    for index, shape in enumerate(shapes):
        std = WEIGHT_STD if len(shape) == 2 else VECTOR_STD
        param = torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(std).to(dtype))
        log_scale = torch.randn((), generator=generator) * LOG_SCALE_STD + LOG_SCALE_MEAN
        grad = torch.randn(shape, generator=generator).mul_(log_scale.exp())
        if index == 0:
            grad[torch.rand(shape[0], generator=generator) < ZERO_ROWS] = 0
        param.grad = grad.to(dtype)
        params.append(param)
    return params


def grads_of(params: list[Tensor]) -> list[Tensor]:
    """Their gradients, none missing."""
    return [param.grad for param in params if param.grad is not None]


def random_positions(shapes: list[Shape], count: int, seed: int = 1) -> list[Tensor]:
    """`count` distinct entries, uniform over all tensors: ascending flat positions of each."""
    generator = torch.Generator().manual_seed(seed)
    total = num_entries(shapes)
    if count > total // 2:
        chosen = torch.randperm(total, generator=generator)[:count]
    else:
        drawn = torch.randint(total, (count + count // 2 + 64,), generator=generator).unique()
        chosen = drawn[torch.randperm(drawn.numel(), generator=generator)[:count]]
    sizes = torch.tensor([0] + [torch.Size(shape).numel() for shape in shapes])
    starts, chosen = sizes.cumsum(0), chosen.sort().values
    edges = torch.searchsorted(chosen, starts).tolist()
    return [
        chosen[first:last] - start
        for first, last, start in zip(edges, edges[1:], starts.tolist(), strict=False)
    ]
