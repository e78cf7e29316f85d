"""Loss scaling without an extra pass over the gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_optim.optim.masked_adamw import MaskedAdamW


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler, but for our optimizers without its inspection of the gradients.

    Before the step of an optimizer that unscales by itself, torch reads and writes every gradient
    to look for infinities. The scan of `MaskedAdamW.step` reads them anyway: its result decides
    whether the step is skipped, and `update()` adjusts the scale accordingly.
    Steps, scales and weights are those of torch's scaler bit for bit. Other optimizers in the same
    loop are handled as by torch.

    `unscale_(optimizer)` works as in torch, at the price of the pass that this class saves; to
    clip, pass `max_grad_norm` to the optimizer instead. Groups with unmask="none" are not
    inspected.

    Args:
        device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in
            torch.amp.GradScaler, whose checkpoints it reads and writes.

    Examples:
        >>> import torch
        >>> from sparse_optim import IncrementalMaskedAdamW
        >>> model = torch.nn.Linear(8, 2)
        >>> optimizer = IncrementalMaskedAdamW(model.parameters(), budget=4, total_steps=2)
        >>> scaler = GradScaler("cpu")
        >>> scaler.scale(model(torch.full((1, 8), 1e38)).sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> optimizer.metrics()["skipped_steps"], scaler.get_scale()
        (1, 32768.0)
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[Any, Any]:
        """Called by torch before the step: for ours, return a flag that the step will set."""
        if not (isinstance(optimizer, MaskedAdamW) and optimizer.holds_gradients):
            return super()._check_inf_per_device(optimizer)
        device = optimizer.engine.pool.device
        found: dict[torch.device, Tensor] = {
            device: torch.zeros((), dtype=torch.float32, device=device)
        }
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step unless a gradient is infinite or NaN; see torch.amp.GradScaler.step."""
        if not (self._enabled and isinstance(optimizer, MaskedAdamW) and optimizer.holds_gradients):
            return super().step(optimizer, *args, **kwargs)
        optimizer.scaler_reads_scan = True
        try:
            result = super().step(optimizer, *args, **kwargs)
        finally:
            optimizer.scaler_reads_scan = False
            # torch deletes these after a step that returns; after one that raises, the next call
            # would multiply the scale by what is left.
            for name in ("grad_scale", "found_inf"):
                vars(optimizer).pop(name, None)
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for flag in found.values():
            flag.copy_(optimizer.engine.work.scalars.found_inf)
        return result

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, as in torch; there are none with `fuse_backward`."""
        ours = self._enabled and isinstance(optimizer, MaskedAdamW)
        if ours and (optimizer.fuse_backward or optimizer.sampled_backward):  # type: ignore[attr-defined]
            raise RuntimeError(
                "unscale_ does not find the gradients with fuse_backward=True or "
                "sampled_backward=True; leave it out: step() unscales by itself, and clips if the "
                "optimizer was given max_grad_norm"
            )
        super().unscale_(optimizer)
