"""What kernels find of weights for the host to check: it waits for that, and not for the sweep after it."""

from typing import Any, ClassVar

import torch
from torch import Tensor


class Findings:
    """Some floats a matrix, in memory of the host that the device writes to itself.

    A context manager: it is left when the device has written, also if an exception ends the block.

    Attributes:
        values: float32, `width` a matrix.
    """

    _idle: ClassVar[dict[int, list[tuple[Tensor, Any]]]] = {}  # by device
    _ROOM = 2048  # floats

    def __init__(self, matrices: int, width: int, device: torch.device) -> None:
        self._size = matrices * width
        self._device = device
        self._event: Any = None
        self._marked = False
        if device.type != "cuda" or not matrices:
            self.values = torch.empty(self._size)
        elif self._size > self._ROOM:
            self.values, self._event = self._allocate(self._size)
        else:
            try:
                self.values, self._event = self._idle.setdefault(device.index, []).pop()
            except IndexError:
                self.values, self._event = self._allocate(self._ROOM)

    @staticmethod
    def _allocate(size: int) -> tuple[Tensor, Any]:
        return torch.empty(size, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """All that writes is launched: what is launched later is not waited for."""
        if self._event:
            self._event.record()
            self._marked = True

    def read(self) -> list[float]:
        """All values, after a wait for them."""
        if self._event:
            self._event.synchronize()
        return self.values[: self._size].tolist()

    def __enter__(self) -> "Findings":
        return self

    def __exit__(self, *exception: object) -> None:
        """The memory goes back for reuse once nothing writes to it."""
        if not self._event:
            return
        if self._marked:
            self._event.synchronize()
        else:  # something failed on the way there
            torch.cuda.synchronize(self._device)
        if self._size <= self._ROOM:
            self._idle[self._device.index].append((self.values, self._event))
