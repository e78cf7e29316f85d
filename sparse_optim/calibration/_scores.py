"""The scores: empirical Fisher information, SNIP, GraSP, SynFlow, Child-Tuning-D."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_optim.calibration._batches import on_device, single_samples, tracked
from sparse_optim.calibration._session import calibrating, check_finite, gradients, zero_scores

Loss = Callable[[nn.Module, Any], Tensor]

SAMPLE_TYPES = ("label", "expect")


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 1024,
    sample_type: str = "label",
    loss: Loss | None = None,
    params: Collection[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Empirical Fisher information of every entry (Fish mask).

        "label":   score = sum_samples (d loss / d theta)^2
        "expect":  score = sum_samples sum_classes p_c (d log p_c / d theta)^2

    Batches are split into single samples, because squared gradients of batches are another score
    (see `child_tuning_d`). "expect" needs no labels and takes one backward per class.

    Args:
        model: any module; for transformers models, batches are dicts that hold `labels`.
        batches: a DataLoader or any iterable of batches, on any device.
        samples: use this number of samples, or all if there are fewer.
        sample_type: "label" uses the true labels, "expect" the model's own probabilities
            (sequence classification: `model(**batch).logits` of shape (1, classes)).
        loss: loss(model, batch) -> 0-dim tensor; default `model(**batch).loss`.
        params: names to score; default all that require gradients.
        progress: show a bar on a terminal.

    Returns:
        float32 scores by parameter name, shaped as the parameter, on its device. Memory: the scores
        and one gradient at a time.

    Raises:
        ValueError: no data, no loss or logits, a loss without gradient, scores that are not finite.

    Reference: Sung et al. 2021, Training Neural Networks with Fixed Sparse Masks
    (arXiv:2111.09839).
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if sample_type not in SAMPLE_TYPES:
        raise ValueError(f"sample_type must be one of {SAMPLE_TYPES}, got {sample_type!r}")
    if sample_type == "expect" and loss is not None:
        raise ValueError('sample_type="expect" uses the model\'s logits: give no loss')
    with calibrating(model, params) as chosen:
        scores, weight = zero_scores(chosen), 1.0

        def add_square(name: str, grad: Tensor) -> None:
            scores[name].addcmul_(grad, grad, value=weight)

        singles = chain.from_iterable(map(single_samples, on_device(batches, _device(chosen))))
        with gradients(chosen, add_square):
            for sample in tracked(islice(singles, samples), samples, "Fisher", progress):
                if sample_type == "label":
                    loss_of(model, sample, loss).backward()
                    continue
                log_probs = _log_probs(model, sample)
                for log_prob in log_probs:
                    weight = float(log_prob.detach().exp())
                    log_prob.backward(retain_graph=log_prob is not log_probs[-1])
    return check_finite(scores)


def child_tuning_d(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    params: Collection[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Fisher information from one pass of batch gradients.

        score = mean_batches (d loss(batch) / d theta)^2

    Batches are not split. The method's mask covers encoder entries: name them in `params`.
    Arguments, result and errors as for `fisher`.

    Reference: Xu et al. 2021, Raise a Child in Large Language Model (arXiv:2109.05687).
    """
    with calibrating(model, params) as chosen:
        scores, count = zero_scores(chosen), 0

        def add_square(name: str, grad: Tensor) -> None:
            scores[name].addcmul_(grad, grad)

        with gradients(chosen, add_square):
            for batch in _batches(batches, chosen, "Child-Tuning-D", progress):
                loss_of(model, batch, loss).backward()
                count += 1
    return check_finite({name: score.div_(count) for name, score in scores.items()})


def gradient(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    params: Collection[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Size of the gradient of the mean loss: D3 with exp = 0, over several batches.

        score = |g|,  g = mean_batches d loss(batch) / d theta

    Arguments, result and errors as for `fisher`.
    """
    with calibrating(model, params) as chosen:
        batches = _batches(batches, chosen, "gradient", progress)
        scores = _mean_gradient(model, batches, loss, chosen)
    return check_finite({name: score.abs_() for name, score in scores.items()})


def snip(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    params: Collection[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Connection sensitivity: the change of the loss if an entry is removed, to first order.

        score = |theta * g|,  g = mean_batches d loss(batch) / d theta

    All batches are read: give one or several. Arguments, result and errors as for `fisher`.

    Reference: Lee et al. 2019, SNIP (arXiv:1810.02340); its normalisation, which changes no rank,
    is left out. Used by He et al. 2022, SparseAdapter (arXiv:2210.04284).
    """
    with calibrating(model, params) as chosen:
        scores = _mean_gradient(model, _batches(batches, chosen, "SNIP", progress), loss, chosen)
    with torch.no_grad():
        for name, param in chosen.items():
            scores[name].mul_(param).abs_()
    return check_finite(scores)


def grasp(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    params: Collection[str] | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Gradient signal preservation: how much an entry contributes to the gradient's norm.

        score = max(theta * (H g), 0),  g and H of the mean loss over the batches

    The paper scores S(-theta) = -theta * (H g) and removes the highest, so that theta * (H g)
    ranks what it keeps. Entries below 0 (without which the gradient would grow) become 0: they are
    never unmasked, and a budget beyond the positive ones is not filled.

    The batches are kept and read twice, and the gradient is held beside the scores. Attention runs
    in its plain form, the only one with a second derivative. Arguments, result and errors as for
    `fisher`.

    Reference: Wang et al. 2020, Picking Winning Tickets Before Training by Preserving Gradient
    Flow (arXiv:2002.07376), without its temperature. Used by SparseAdapter (arXiv:2210.04284).
    """
    with calibrating(model, params) as chosen, sdpa_kernel(SDPBackend.MATH):
        kept = list(on_device(batches, _device(chosen)))
        first, second = (
            tracked(kept, len(kept), title, progress) for title in ("GraSP, g", "GraSP, Hg")
        )
        mean_grad = _mean_gradient(model, first, loss, chosen)
        scores = zero_scores(chosen)
        with gradients(chosen, lambda name, product: scores[name].add_(product)):
            for batch in second:
                grads = torch.autograd.grad(
                    loss_of(model, batch, loss),
                    list(chosen.values()),
                    create_graph=True,
                    allow_unused=True,
                )
                products = [
                    (grad * mean_grad[name].to(grad.dtype)).sum()
                    for name, grad in zip(chosen, grads, strict=True)
                    if grad is not None and grad.requires_grad  # else its Hessian is 0
                ]
                if products:
                    torch.stack(products).sum().backward()
    with torch.no_grad():
        for name, param in chosen.items():
            scores[name].mul_(param).div_(len(kept)).clamp_(min=0)
    return check_finite(scores)


def synflow(
    model: nn.Module,
    forward: Callable[[nn.Module], Tensor],
    *,
    params: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Synaptic flow: the share of all paths through the network that pass an entry. Needs no data.

        score = | |theta| * dR / d|theta| |,  R = sum(output for an input of ones, under |theta|)

    Meant for networks without normalisation layers, where each score is a sum over paths; through
    a LayerNorm it is still computed, but is not such a sum.

    Args:
        model: any module.
        forward: calls the model with ones and returns its output, for instance
            `lambda model: model(inputs_embeds=torch.ones(1, 1, width)).logits`.
        params: names to score; default all that require gradients.

    Returns:
        As `fisher`.

    Raises:
        ValueError: an output that does not depend on the parameters, scores that are not finite.

    Reference: Tanaka et al. 2020, Pruning Neural Networks without any Data (arXiv:2006.05467), a
    single round. Used by SparseAdapter (arXiv:2210.04284).
    """
    with calibrating(model, params) as chosen, absolute_parameters(model):
        scores = zero_scores(chosen)

        def multiply(name: str, grad: Tensor) -> None:
            torch.mul(grad, chosen[name].detach(), out=scores[name]).abs_()

        with gradients(chosen, multiply):
            _check_differentiable(forward(model).sum()).backward()
    return check_finite(scores)


@contextmanager
def absolute_parameters(model: nn.Module) -> Iterator[None]:
    """Replace every parameter by its absolute value inside the block; restore signs at the end."""
    negative = [(param, torch.signbit(param)) for param in model.parameters()]
    with torch.no_grad():
        for param, _ in negative:
            param.abs_()
    try:
        yield
    finally:
        with torch.no_grad():
            for param, sign in negative:
                param.copy_(torch.where(sign, -param, param))


def _device(chosen: dict[str, nn.Parameter]) -> torch.device:
    return next(iter(chosen.values())).device


def _batches(
    batches: Iterable[Any], chosen: dict[str, nn.Parameter], title: str, progress: bool
) -> Iterator[Any]:
    total = length_hint(batches) or None
    return tracked(on_device(batches, _device(chosen)), total, title, progress)


def _mean_gradient(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None, chosen: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Gradient of the mean loss over the batches, float32."""
    total, count = zero_scores(chosen), 0
    with gradients(chosen, lambda name, grad: total[name].add_(grad)):
        for batch in batches:
            loss_of(model, batch, loss).backward()
            count += 1
    return {name: grad.div_(count) for name, grad in total.items()}


def loss_of(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    """The loss of a batch, differentiable."""
    if loss is not None:
        return _check_differentiable(loss(model, batch))
    value = getattr(_call(model, batch), "loss", None)
    if value is None:
        raise ValueError("the model returned no loss: put 'labels' into the batches, or give loss=")
    return _check_differentiable(value)


def _call(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}; expected a dict of the model's arguments, or "
            "give loss=, a function of (model, batch)"
        )
    return model(**batch)


def _check_differentiable(value: Tensor) -> Tensor:
    if value.ndim:
        raise ValueError(f"the loss must be a 0-dim tensor, got shape {tuple(value.shape)}")
    if not value.requires_grad:
        raise ValueError(
            "the loss has no gradient: it depends on none of the scored parameters, or was "
            "computed under torch.no_grad()"
        )
    return value


def _log_probs(model: nn.Module, sample: Any) -> tuple[Tensor, ...]:
    """log p_c of every class of one sample."""
    logits = getattr(_call(model, sample), "logits", None)
    if logits is None:
        raise ValueError('sample_type="expect" needs a model that returns logits; use "label"')
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(
            'sample_type="expect" needs logits of shape (1, classes) with two classes or more, '
            f'got {tuple(logits.shape)}; use "label"'
        )
    log_probs = logits.float().log_softmax(-1)[0]
    return tuple(_check_differentiable(log_prob) for log_prob in log_probs)
