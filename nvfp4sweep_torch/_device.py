"""A sweep by the core's CUDA kernels: allocate, launch on the current stream, check."""

import contextlib
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvfp4sweep import problem as problems
from nvfp4sweep.problem import Problem
from nvfp4sweep_torch._tensors import host_amax

_DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
_NO_CONTEXT = contextlib.nullcontext()


def run(
    weight: Tensor, asked: Problem, global_amax: Any, outputs: tuple[str, ...], *, check_finite: bool
) -> list[Tensor]:
    """The outputs of these names. Waits for the device only to check, and then not for the sweep itself.

    Raises:
        ValueError: a weight or a global amax that was read is not finite, or an amax is negative.
    """
    launch = _triton_launch()
    view = weight.reshape(asked.view_shape)  # copies only if no view can merge the axes
    device = weight.device
    with _on_device(weight):
        given = None if global_amax is None else _device_amax(global_amax, weight, asked)
        watch = _Watch(weight, asked) if check_finite else None
        found = launch.run(
            view,
            asked,
            outputs,
            lambda shape, dtype: torch.empty(shape, dtype=_DTYPES[dtype], device=device),
            given,
            checked=watch and watch.values,
            after_check=watch and watch.mark,
        )
        if watch:
            watch.check()
    return list(found.values())


class _Watch:
    """What the device found that must be finite, in memory of the host that it writes to itself.

    The memory and its event go back for reuse only after a wait that was not interrupted.
    """

    _idle: dict[int, list[tuple[Tensor, Any]]] = {}  # by device  # noqa: RUF012
    _ROOM = 512  # matrices

    def __init__(self, weight: Tensor, asked: Problem):
        self._weight = weight
        self._problem = asked
        self._matrices = asked.view_shape[0]
        self._event = None
        if not weight.is_cuda:
            self.values = torch.empty(2 * self._matrices)
        elif self._matrices > self._ROOM:
            self.values, self._event = self._allocate(self._matrices)
        else:
            try:
                self.values, self._event = self._idle.setdefault(weight.device.index, []).pop()
            except IndexError:
                self.values, self._event = self._allocate(self._ROOM)

    @staticmethod
    def _allocate(matrices: int) -> tuple[Tensor, Any]:
        return torch.empty(2 * matrices, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def mark(self) -> None:
        """What is launched later is not waited for."""
        if self._event:
            self._event.record()

    def check(self) -> None:
        if self._event:
            self._event.synchronize()
        values = self.values[: 2 * self._matrices].tolist()
        if self._event and self._matrices <= self._ROOM:
            self._idle[self._weight.device.index].append((self.values, self._event))
        if not all(map(math.isfinite, values[::2])):
            index = torch.nonzero(~torch.isfinite(self._weight))[0].tolist()
            raise problems.nonfinite_error("weight", index, self._weight[tuple(index)].item())
        if not all(0 <= amax < math.inf for amax in values[1::2]):
            amaxes = np.array(values[1::2], np.float32).reshape(self._problem.batch_shape)
            problems.global_amax_per_matrix(amaxes, self._problem)


def _device_amax(global_amax: Any, weight: Tensor, asked: Problem) -> Tensor:
    if isinstance(global_amax, Tensor) and global_amax.is_cuda:
        amax = global_amax.to(torch.float32)
        if amax.shape != asked.batch_shape:
            problems.check_global_amax_shape(tuple(amax.shape), asked)
            amax = amax.broadcast_to(asked.batch_shape)
        return amax.contiguous()
    return torch.from_numpy(host_amax(global_amax, asked)).to(weight.device)


def _on_device(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    if weight.is_cuda and torch.cuda.current_device() != weight.get_device():
        return torch.cuda.device(weight.device)
    return _NO_CONTEXT


@functools.cache
def _triton_launch() -> Any:
    try:
        from nvfp4sweep import triton_launch
    except ImportError as error:
        raise RuntimeError(
            "CUDA tensors need Triton 3.6 or later: pip install 'nvfp4sweep[triton]'"
        ) from error
    return triton_launch
