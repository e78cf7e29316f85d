"""DPS: a dense window of steps chooses the entries that the next window trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_optim.methods._request import MethodRequest, check_whole_gradients
from sparse_optim.policy.selection import resolve_budget

Optimizer = TypeVar("Optimizer", bound="DynamicParameterSelection")

SUMS = frozenset({"fisher", "kept_steps"})  # state that adds up over the steps of a window
WINDOWS = 20  # in a run; the paper has the length of a window as a hyper-parameter


class DynamicParameterSelection(torch.optim.AdamW):
    """AdamW that alternates dense and sparse windows of steps (DPS Dense).

        dense window    every entry moves;  F += g^2  for each Linear weight
        sparse window   of each Linear weight only the top share of F moves; F is reset after it

    Biases, norms, embeddings, the head, and weights that never had a gradient in a dense window
    move in every step. Entries that a sparse window leaves out keep value and moments. A baseline:
    its state is larger than full fine-tuning's, by F and the mask.

    Args:
        params: param groups, as for torch.optim.AdamW.
        linear: the weights that sparse windows restrict.
        share: share of each such weight to train, above 0, at most 1; at least one entry.
        window: steps in a window, >= 1.
        options: further arguments of torch.optim.AdamW.

    Raises:
        ValueError: if a number is out of range.

    Reference: Zhang et al. 2022, Fine-Tuning Pre-Trained Language Models Effectively by Optimizing
    Subnetworks Adaptively, NeurIPS 35. DPS Mix, with mixout in the dense windows: `DPSMix`.
    """

    def __init__(
        self,
        params: Any,
        linear: Iterable[nn.Parameter],
        share: float,
        window: int,
        **options: Any,
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if window < 1:
            raise ValueError(f"window must be at least 1 step, got {window}")
        super().__init__(params, **options)
        self.linear = tuple(linear)
        self.share = share
        self.window = window
        for group in self.param_groups:
            group["steps_taken"] = 0  # here, so that it is in the state_dict

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of the current window."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = self.param_groups[0]["steps_taken"]
        position = taken % (2 * self.window)
        if position == self.window:
            self._choose()
        kept = self._kept() if position >= self.window else []
        super().step()
        for tensor, before, mask in kept:
            tensor.copy_(torch.where(mask, tensor, before))
        if position < self.window:
            self._accumulate()
        for group in self.param_groups:
            group["steps_taken"] = taken + 1
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint. Sums keep their dtype, which torch would make that of the weights."""
        super().load_state_dict(state_dict)
        for group, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for param, key in zip(group["params"], theirs["params"], strict=True):
                saved = state_dict["state"].get(key, {})
                for name in SUMS & saved.keys():
                    self.state[param][name] = saved[name].to(param.device, sum_dtype(param))

    def _accumulate(self) -> None:
        for param in self.linear:
            if param.grad is not None:
                state = self.state[param]
                if "fisher" not in state:
                    state["fisher"] = torch.zeros_like(param, dtype=sum_dtype(param))
                grad = param.grad.to(state["fisher"].dtype)
                state["fisher"].addcmul_(grad, grad)

    def _choose(self) -> None:
        for param in self.linear:
            state = self.state[param]
            if "fisher" in state:
                count = max(1, round(self.share * param.numel()))
                mask = torch.zeros_like(param).view(-1)
                mask[self._score(param).reshape(-1).topk(count).indices] = 1
                state["chosen"] = mask.view_as(param)
                state["fisher"].zero_()

    def _score(self, param: nn.Parameter) -> Tensor:
        """What ranks the entries of a weight at the end of a dense window."""
        score: Tensor = self.state[param]["fisher"]
        return score

    def _kept(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Tensors of restricted parameters, copies of them, and where they may change."""
        found = []
        for param in self.linear:
            state = self.state[param]
            if "chosen" in state:
                mask = state["chosen"].bool()
                tensors = (param, state["exp_avg"], state["exp_avg_sq"])
                found += [(tensor, tensor.clone(), mask) for tensor in tensors]
        return found


def sum_dtype(param: Tensor) -> torch.dtype:
    """float32 at least: a sum in bfloat16 does not grow beyond 256 times what it adds."""
    return torch.promote_types(param.dtype, torch.float32)


def dps(request: MethodRequest) -> DynamicParameterSelection:
    """Windows of a twentieth of the run; the budget is a share of the Linear weights.

    Raises:
        ValueError: the model has no Linear weight among the ranked parameters, or gradients are to
            be freed inside the backward pass.
    """
    linear = linear_weights(request).values()
    return build_dps(request, DynamicParameterSelection, linear)


def linear_weights(request: MethodRequest) -> dict[int, nn.Parameter]:
    """The ranked weights of Linear modules by their id.

    Raises:
        ValueError: there are none.
    """
    weights = {
        id(module.weight) for module in request.model.modules() if isinstance(module, nn.Linear)
    }
    linear = {id(param): param for _, param in request.ranked if id(param) in weights}
    if not linear:
        raise ValueError("dps has nothing to select from: no ranked weight of a Linear module")
    return linear


def build_dps(
    request: MethodRequest, kind: Callable[..., Optimizer], linear: Iterable[Any], **options: Any
) -> Optimizer:
    """Build an optimizer of this family from a request.

    Args:
        kind: `DynamicParameterSelection` or a subclass.
        linear: its second argument.
        options: further arguments of it.

    Raises:
        ValueError: a budget that is out of range, or gradients are to be freed inside the backward
            pass.
    """
    check_whole_gradients(request)
    size = sum(param.numel() for param in linear_weights(request).values())
    return kind(
        request.param_groups(request.named),
        linear,
        resolve_budget(request.given_budget, size) / size,
        math.ceil(request.total_steps / WINDOWS),
        lr=request.lr,
        betas=request.betas,
        eps=request.adam_eps,
        **options,
    )
