"""A sweep by the core's CUDA kernels: allocate, launch on the current stream, check."""

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvfp4sweep import problem as problems
from nvfp4sweep.problem import Problem
from nvfp4sweep_torch._tensors import host_amax


class DeviceSweep:
    """The tables of a weight on its device, and the launches that need them.

    Nothing waits for the device except `check_finite`.
    """

    def __init__(self, weight: Tensor, asked: Problem, global_amax: Any = None, *, find_largest: bool = True):
        self._launch = _triton_launch()
        self._weight = weight
        self._problem = asked
        self._view = weight.reshape(asked.view_shape)  # copies only if no view can merge the axes
        self._workspace = self._empty((self._launch.workspace_size(asked),))
        self._given = None if global_amax is None else self._device_amax(global_amax)
        with self._on_device():
            self._launch.tabulate(self._view, asked, self._workspace, self._given, find_largest=find_largest)

    def sweep(self, *, want_code: bool) -> tuple[Tensor, Tensor]:
        """(amax, code); code is empty unless it is wanted."""
        shape = self._problem.block_shape
        amax = self._empty(shape)
        code = self._empty(shape if want_code else (0,), torch.uint8)
        with self._on_device():
            self._launch.sweep(self._view, self._problem, self._workspace, amax, code if want_code else None)
        return amax, code

    def residual(self, code: Tensor) -> Tensor:
        error = self._empty(self._problem.block_shape)
        with self._on_device():
            self._launch.residual(self._view, self._problem, self._workspace, code, error)
        return error

    def pack(self, code: Tensor) -> Tensor:
        packed = self._empty(self._problem.packed_shape, torch.uint8)
        with self._on_device():
            self._launch.pack(self._view, self._problem, self._workspace, code, packed)
        return packed

    def global_amax(self) -> Tensor:
        """float32 of the batch axes' shape; infinite or NaN where it is the amax of such elements."""
        return self._column(self._launch.GLOBAL_AMAX_COLUMN).reshape(self._problem.batch_shape).clone()

    def check_finite(self) -> None:
        """Wait for what was launched, and raise ValueError if a weight or amax it read was not finite."""
        largest = self._column(self._launch.LARGEST_COLUMN).cpu().numpy()
        if not np.isfinite(largest).all():
            index = torch.nonzero(~torch.isfinite(self._weight))[0].tolist()
            raise problems.nonfinite_error("weight", index, self._weight[tuple(index)].item())
        if self._given is not None:
            host_amax(self._given.reshape(self._problem.batch_shape), self._problem)

    def _column(self, column: int) -> Tensor:
        matrices, size = self._problem.view_shape[0], self._launch.TABLE_SIZE
        return self._workspace[: matrices * size].view(matrices, size)[:, column]

    def _device_amax(self, global_amax: Any) -> Tensor:
        if isinstance(global_amax, Tensor) and global_amax.device.type == "cuda":
            problems.check_global_amax_shape(tuple(global_amax.shape), self._problem)
            amax = global_amax.detach().float().broadcast_to(self._problem.batch_shape)
            return amax.reshape(-1).contiguous()
        return torch.from_numpy(host_amax(global_amax, self._problem)).to(self._weight.device)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._weight.device)

    def _on_device(self) -> contextlib.AbstractContextManager[Any]:
        if self._weight.device.type == "cuda":
            return torch.cuda.device(self._weight.device)
        return contextlib.nullcontext()


def _triton_launch() -> Any:
    try:
        from nvfp4sweep import triton_launch
    except ImportError as error:
        raise RuntimeError(
            "CUDA tensors need Triton 3.6 or later: pip install 'nvfp4sweep[triton]'"
        ) from error
    return triton_launch
