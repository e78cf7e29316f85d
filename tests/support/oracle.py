"""ID3 by brute force: a full sort, dense masks, and torch.optim.AdamW on masked gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

HYPER = ("lr", "betas", "eps", "weight_decay", "maximize")


def score(grad: Tensor, param: Tensor, exp: float, eps: float) -> np.ndarray:
    """|grad| / (|param| + eps)^exp in float32, each operation correctly rounded (numpy's)."""
    magnitude, base = (tensor.detach().float().abs().numpy().ravel() for tensor in (grad, param))
    base = base + np.float32(eps)
    if exp == 0:
        return magnitude
    power = {1: base, -1: base, 2: base * base, 0.5: np.sqrt(base), -0.5: np.sqrt(base)}[exp]
    return magnitude * power if exp < 0 else magnitude / power


class _Cohort:
    """Entries that share one Adam step count, trained by one dense torch.optim.AdamW."""

    def __init__(self, oracle: Oracle, unmask_step: int) -> None:
        self.unmask_step = unmask_step
        self.masks = [torch.zeros(p.shape, dtype=torch.bool) for p in oracle.initial]
        self.params = [torch.nn.Parameter(p.to(oracle.dtype)) for p in oracle.initial]
        groups = [
            {"params": [param], **{name: group[name] for name in HYPER}}
            for param, group in zip(self.params, oracle.group_of, strict=True)
        ]
        self.adam = torch.optim.AdamW(groups)
        for param in self.params:
            self.adam.state[param] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }

    def step(self, oracle: Oracle, grads: Sequence[Tensor | None], factor: float) -> None:
        for group, source in zip(self.adam.param_groups, oracle.group_of, strict=True):
            group.update({name: source[name] for name in HYPER})
        for param, mask, grad in zip(self.params, self.masks, grads, strict=True):
            self.adam.state[param]["step"].fill_(oracle.step_count - self.unmask_step)
            param.grad = None if grad is None else grad.to(oracle.dtype) * factor * mask
            if grad is not None and grad.numel():
                oracle.largest = max(oracle.largest, float(param.grad.abs().max()))
        self.adam.step()
        with torch.no_grad():  # weight decay moved frozen entries: put them back
            for param, mask, initial in zip(self.params, self.masks, oracle.initial, strict=True):
                param[~mask] = initial[~mask].to(oracle.dtype)


class Oracle:
    """What MaskedAdamW promises, at the cost of everything that it saves.

    Args:
        params: the pool, in order; copied.
        group_of: for each parameter the live param group that it trains under.
        targets: cumulative targets after steps 0..T.
        dtype: that AdamW computes in; float64 to judge errors, float32 to allow for them.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        group_of: Sequence[dict[str, Any]],
        targets: Sequence[int],
        *,
        exp: float = 0.0,
        eps: float = 1.0,
        bias_correction: str = "entry",
        max_grad_norm: float = math.inf,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.initial = [param.detach().clone() for param in params]
        self.group_of, self.targets, self.dtype = list(group_of), list(targets), dtype
        self.exp, self.eps, self.max_grad_norm = exp, eps, max_grad_norm
        self.bias_correction = bias_correction
        regular = [b - a for a, b in zip(self.targets, self.targets[1:], strict=False)]
        self.max_quota = 2 * max(regular)
        self.step_count = self.skipped = self.entry_updates = 0
        self.mask = [torch.zeros(param.shape, dtype=torch.bool) for param in params]
        self.cohorts = [_Cohort(self, 1)] if bias_correction == "global" else []
        self.grad_norm, self.grad_factor = 0.0, 1.0
        self.largest = 0.0  # |gradient| that AdamW has been given

    @property
    def num_active(self) -> int:
        return sum(int(mask.sum()) for mask in self.mask)

    def choose(self, grads: Sequence[Tensor | None], quota: int) -> list[Tensor]:
        """Masks of the `quota` best frozen entries: a stable full sort, so ties by position."""
        scores = []
        for grad, param, mask in zip(grads, self.initial, self.mask, strict=True):
            if grad is None:
                scores.append(np.zeros(param.numel(), dtype=np.float32))
                continue
            value = score(grad, param, self.exp, self.eps)
            scores.append(np.where(mask.numpy().ravel(), 0, np.nan_to_num(value, posinf=np.inf)))
        flat = np.concatenate(scores)
        best = np.argsort(-flat, kind="stable")[:quota]
        chosen = np.zeros(flat.size, dtype=bool)
        chosen[best[flat[best] > 0]] = True
        sizes = [param.numel() for param in self.initial]
        parts = torch.from_numpy(chosen).split(sizes)
        return [part.view(param.shape) for part, param in zip(parts, self.initial, strict=True)]

    def step(
        self,
        grads: Sequence[Tensor | None],
        others: Sequence[Tensor] = (),
        factor: float | None = None,
    ) -> bool:
        """One step; False if it was skipped.

        Args:
            grads: of the pool; None where missing.
            others: gradients of dense groups, which count in the norm and the skip.
            factor: what to multiply gradients by, instead of the clip factor computed here.
        """
        held = [grad for grad in [*grads, *others] if grad is not None]
        if not all(bool(grad.isfinite().all()) for grad in held):
            self.skipped += 1
            return False
        self.grad_norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in held))
        self.grad_factor = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))
        factor = self.grad_factor if factor is None else factor
        self.step_count += 1
        target = self.targets[min(self.step_count, len(self.targets) - 1)]
        chosen = self.choose(grads, min(max(target - self.num_active, 0), self.max_quota))
        if self.bias_correction == "entry" and any(bool(mask.any()) for mask in chosen):
            self.cohorts.append(_Cohort(self, self.step_count))
        for index, mask in enumerate(chosen):
            self.mask[index] |= mask
            if mask.any():
                self.cohorts[-1].masks[index] |= mask
        for cohort in self.cohorts:
            cohort.step(self, grads, factor)
        self.entry_updates += self.num_active
        return True

    def _gather(self, initial: Sequence[Tensor], pick: Any) -> list[Tensor]:
        result = [tensor.to(self.dtype) for tensor in initial]
        for cohort in self.cohorts:
            for index, mask in enumerate(cohort.masks):
                result[index][mask] = pick(cohort, cohort.params[index])[mask]
        return result

    def values(self) -> list[Tensor]:
        """Every parameter, in `dtype`."""
        return self._gather(self.initial, lambda cohort, param: param.detach())

    def moment(self, name: str) -> list[Tensor]:
        """ "exp_avg" or "exp_avg_sq" of every entry, 0 where frozen."""
        zeros = [torch.zeros(param.shape) for param in self.initial]
        return self._gather(zeros, lambda cohort, param: cohort.adam.state[param][name])
