"""The frame of a calibration pass: restore the model afterwards, keep no gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_optim.engine.sampled import dense_gradients


@contextmanager
def calibrating(
    model: nn.Module, params: Collection[str] | None
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield the parameters to score, by name; inside the block only they get gradients.

    Inside, the model is in eval mode: without dropout, scores are repeatable. At the end, also
    after an error, modes, `requires_grad`, `.grad` and torch's random state are restored.

    Raises:
        ValueError: a name that the model does not have, or nothing to score.
    """
    chosen = chosen_params(model, params)
    modes = [(module, module.training) for module in model.modules()]
    before = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    devices = sorted({p.device.index for p in chosen.values() if p.device.type == "cuda"})
    scored = {id(param) for param in chosen.values()}
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), dense_gradients(model):
        try:
            model.eval()
            for param in model.parameters():
                param.grad = None
                param.requires_grad_(id(param) in scored)
            yield chosen
        finally:
            for module, training in modes:
                module.training = training
            for param, requires_grad, grad in before:
                param.requires_grad_(requires_grad)
                param.grad = grad


def chosen_params(model: nn.Module, params: Collection[str] | None) -> dict[str, nn.Parameter]:
    """The parameters that require gradients: all, or those in `params`."""
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    if params is not None:
        unknown = sorted(set(params) - trainable.keys())
        if unknown:
            raise ValueError(
                f"params: the model has no parameter {unknown[0]!r} that requires gradients; "
                "names are those of model.named_parameters(), tied weights under the first"
            )
        trainable = {name: param for name, param in trainable.items() if name in set(params)}
    if not trainable:
        raise ValueError("nothing to score: no parameter of the model requires gradients")
    return trainable


@contextmanager
def gradients(
    params: dict[str, nn.Parameter], receive: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Inside the block, each backward calls receive(name, grad), one float32 gradient at a time.

    A gradient is freed as soon as it has been received: no two exist at once. The gradient of a
    tied weight comes once, summed over its uses.
    """

    def hook(name: str) -> Callable[[Tensor], None]:
        def receive_and_free(param: Tensor) -> None:
            grad, param.grad = param.grad, None
            assert grad is not None  # torch calls the hook after it has accumulated
            receive(name, grad.detach().to_dense().float())

        return receive_and_free

    handles = [
        param.register_post_accumulate_grad_hook(hook(name)) for name, param in params.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zero_scores(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A float32 score of 0 for every entry."""
    return {
        name: torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        for name, param in params.items()
    }


def check_finite(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Check that all scores are finite, and return them.

    Raises:
        ValueError: names the first parameter with NaN or infinite scores.
    """
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise ValueError(
                f"the scores of {name} are NaN or infinite: look for a loss that is not finite "
                "(labels, empty samples), or load the model in float32"
            )
    return scores
