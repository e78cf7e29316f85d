"""Whether the budget is spent, as the host knows it: at a fixed lag, never by chance.

On a device, the counts of a call are copied to the host while later calls run. Whether a copy has
arrived depends on timing, which no step may: a call learns exactly what was true LAG calls ago, and
waits for that copy if it must. On the CPU there is nothing to wait for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LAG = {"cpu": 0}  # calls, by the type of the device
LAG_OF_OTHERS = 2


class Completion:
    """What is known of one engine's budget.

    Args:
        is_complete: whether counts (applied steps, active entries, skipped steps) are those of a
            budget that is spent; what is complete stays complete.
        device: type of the device that counts.
        known: whether it is complete already.

    Attributes:
        lag: in calls.
    """

    def __init__(
        self, is_complete: Callable[[Sequence[int]], bool], device: str, known: bool
    ) -> None:
        self._is_complete, self.known = is_complete, known
        self.lag = LAG.get(device, LAG_OF_OTHERS)
        self._queue: deque[bool | tuple[Tensor, torch.cuda.Event | None]] = deque()

    def note(self, progress: Tensor) -> None:
        """Take note of the counts after a call, (3,), int64."""
        if self.known:
            return
        if progress.is_cuda:
            if torch.cuda.is_current_stream_capturing():  # the host takes no part in replays
                return
            copy = torch.empty(3, dtype=torch.int64, pin_memory=True)
            copy.copy_(progress, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            copy, event = progress.clone(), None
        self._queue.append((copy, event))
        if len(self._queue) > self.lag:
            self.known = self._read(self._queue.popleft())

    @property
    def flags(self) -> list[bool]:
        """What is known, and what the next calls will learn; waits for the device."""
        return [self.known, *map(self._read, self._queue)]

    @flags.setter
    def flags(self, flags: Sequence[bool]) -> None:
        self.known, self._queue = bool(flags[0]), deque(map(bool, flags[1:]))

    def _read(self, entry: bool | tuple[Tensor, torch.cuda.Event | None]) -> bool:
        if isinstance(entry, bool):
            return entry
        copy, event = entry
        if event is not None:
            event.synchronize()
        return self._is_complete(copy.tolist())

    def __getstate__(self) -> dict[str, object]:
        """Events cannot be copied."""
        return {**vars(self), "_queue": deque(self.flags[1:])}
