"""Shapes of encoders and decoders, and made-up gradients of similar spread, without downloads.

The time of a step depends on the numbers of entries and tensors and on the spread of the gradients:
most rows of the word embedding are zero (tokens that are not in the batch), and gradient scales
differ between tensors by an order of magnitude.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Shape = tuple[int, ...]

ZERO_ROWS = 0.9  # share of the word embedding's rows without gradient
LOG_SCALE_MEAN, LOG_SCALE_STD = -9.0, 1.0  # of the gradient scale of a tensor, log-normal
ROW_POWER = 4  # of the uniform number that scales a row, for gradients of the kind "row-scaled"
WEIGHT_STD, VECTOR_STD = 0.04, 0.5  # of parameters: matrices; biases and norms


def encoder(
    embeddings: list[Shape], hidden: int, intermediate: int, layers: int, head: list[Shape]
) -> list[Shape]:
    """Return the shapes of a BERT-like encoder in parameter order, word embedding first."""
    vector = (hidden,)
    attention = [(hidden, hidden), vector] * 4 + [vector, vector]
    feed_forward = [(intermediate, hidden), (intermediate,), (hidden, intermediate)] + [vector] * 3
    return [*embeddings, vector, vector, *(attention + feed_forward) * layers, *head]


def decoder(
    vocabulary: int, hidden: int, key_value: int, intermediate: int, layers: int, tied: bool
) -> list[Shape]:
    """Return the shapes of a Llama-like decoder; `key_value` is the width of keys and of values."""
    attention = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (hidden, hidden)]
    feed_forward = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    layer = [*attention, *feed_forward, (hidden,), (hidden,)]
    head = [] if tied else [(vocabulary, hidden)]
    return [(vocabulary, hidden), *layer * layers, (hidden,), *head]


def _head(hidden: int) -> list[Shape]:
    """Return the shapes of a pooler and a classifier with two classes."""
    return [(hidden, hidden), (hidden,), (2, hidden), (2,)]


MODELS: dict[str, list[Shape]] = {
    "tiny": encoder([(1000, 64), (32, 64), (2, 64)], 64, 256, 2, _head(64)),  # for tests
    "MiniLM": encoder([(30522, 384), (512, 384), (2, 384)], 384, 1536, 6, _head(384)),
    "BERT-base": encoder([(30522, 768), (512, 768), (2, 768)], 768, 3072, 12, _head(768)),
    "DeBERTa-base": encoder(
        [(128100, 768)], 768, 3072, 12, [(512, 768), (768,), (768,), *_head(768)]
    ),
    "Llama-3.2-1B": decoder(128256, 2048, 512, 8192, 16, tied=True),
    "Llama-7B": decoder(32000, 4096, 4096, 11008, 32, tied=False),
}

MEASURED = ("MiniLM", "BERT-base", "DeBERTa-base")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def num_entries(shapes: list[Shape]) -> int:
    """Return the number of entries of all tensors."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def make_params(
    shapes: list[Shape], dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
) -> list[Tensor]:
    """Draw parameters with `.grad` set; the same seed and device give the same values.

    Args:
        shapes: shapes of the tensors; random rows of the first get no gradient.
        dtype: dtype of parameters and gradients; values are drawn in float32 and rounded.
        seed: seed of all draws.
        device: device that draws and holds the tensors.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    params: list[Tensor] = []
    for index, shape in enumerate(shapes):
        std = WEIGHT_STD if len(shape) == 2 else VECTOR_STD
        param = torch.nn.Parameter(normal(shape).mul_(std).to(dtype))
        log_scale = normal(()) * LOG_SCALE_STD + LOG_SCALE_MEAN
        grad = normal(shape).mul_(log_scale.exp())
        if index == 0:
            zeros = torch.rand(shape[0], generator=generator, device=device) < ZERO_ROWS
            grad[zeros] = 0
        param.grad = grad.to(dtype)
        params.append(param)
    return params


def scale_rows(params: list[Tensor], seed: int = 7) -> list[Tensor]:
    """Replace gradients by ones whose rows differ in scale: `randn * rand(rows, 1) ** 4`.

    The largest entries of real gradients crowd into few rows as well.
    """
    generator = torch.Generator(params[0].device).manual_seed(seed)
    for param in params:
        rows = (param.shape[0],) + (1,) * (param.dim() - 1)
        scale = torch.rand(rows, generator=generator, device=param.device) ** ROW_POWER
        grad = torch.randn(param.shape, generator=generator, device=param.device)
        param.grad = grad.mul_(scale).to(param.dtype)
    return params


def grads_of(params: list[Tensor]) -> list[Tensor]:
    """Return the gradients of parameters that have one."""
    return [param.grad for param in params if param.grad is not None]


def random_positions(shapes: list[Shape], count: int, seed: int = 1) -> list[Tensor]:
    """Draw `count` distinct entries uniformly; return ascending flat positions by tensor."""
    return _random_positions(tuple(shapes), count, seed)


@lru_cache(maxsize=2)  # drawing 17 million takes seconds, and many subjects want the same
def _random_positions(shapes: tuple[Shape, ...], count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    total = num_entries(list(shapes))
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
