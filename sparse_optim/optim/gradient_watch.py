"""A warning where nothing is trained."""

from __future__ import annotations

from sparse_optim.warn import warn_user

STEPS_WITHOUT_GRADIENTS = 10


class GradientWatch:
    """Warns once if no parameter has a gradient in the first STEPS_WITHOUT_GRADIENTS steps.

    torch.optim says nothing of missing gradients, and a few steps may have reasons. A run that has
    none from its first step on has hardly any: the warning names the usual mistakes.
    """

    def __init__(self) -> None:
        self._missed: int | None = 0  # None: there has been a gradient

    def note(self, has_gradients: bool) -> None:
        """Take note of a call of `step`."""
        if has_gradients or self._missed is None:
            self._missed = None
            return
        self._missed += 1
        if self._missed == STEPS_WITHOUT_GRADIENTS:
            warn_user(
                f"no parameter has had a gradient in the first {self._missed} steps: nothing is "
                "trained. Is backward() called before step(), and zero_grad() after it? Does the "
                "optimizer hold the model's parameters? What replaces them (fully_shard, a new "
                "model) must come before the optimizer is built",
                RuntimeWarning,
            )
