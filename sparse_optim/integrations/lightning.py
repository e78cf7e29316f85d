"""Lightning: `gradient_clip_val` clips within the optimizer's step.

    class Classifier(SelectiveModuleMixin, LightningModule):
        def configure_optimizers(self):
            return IncrementalMaskedAdamW(
                param_groups(self, dense="head"), lr=5e-4, budget=0.01,
                total_steps=self.trainer.estimated_stepping_batches, model=self,
            )

Lightning itself is not imported: `lightning.pytorch` and `pytorch_lightning` both work.
"""

from __future__ import annotations

import math
from typing import Any

from sparse_optim.integrations.unwrap import unwrap


class SelectiveModuleMixin:
    """For a LightningModule; see the module.

    Gradients are clipped to the lower of the trainer's `gradient_clip_val` and the optimizer's own
    `max_grad_norm`, within the optimizer's step. Lightning itself would read and write every
    gradient for it, would find only a part of them with `sampled_backward` and none with
    `fuse_backward`, and refuses to clip with mixed precision.
    """

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: Any = None,
    ) -> None:
        """Leave clipping to the optimizer; it takes over a lower limit of the trainer.

        Raises:
            ValueError: `gradient_clip_algorithm="value"`, which the optimizer does not have.
        """
        masked = unwrap(optimizer)
        if masked is None:
            super().configure_gradient_clipping(  # type: ignore[misc]
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
        elif gradient_clip_val:
            if gradient_clip_algorithm not in (None, "norm"):
                raise ValueError(
                    f"gradient_clip_algorithm={str(gradient_clip_algorithm)!r}: the optimizer "
                    'clips the global norm of gradients: use "norm"'
                )
            own = math.inf if masked.max_grad_norm is None else masked.max_grad_norm
            masked.max_grad_norm = min(own, float(gradient_clip_val))
