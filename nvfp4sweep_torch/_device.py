"""A sweep by the core's CUDA kernels: allocate, launch on the current stream, check."""

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nvfp4sweep import objectives
from nvfp4sweep import problem as problems
from nvfp4sweep.problem import Problem
from nvfp4sweep_torch._findings import Findings
from nvfp4sweep_torch._tensors import to_numpy, to_numpy_if_tensor

_DTYPES = {"float32": torch.float32, "uint8": torch.uint8}
_NO_CONTEXT: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_UNIT = 16  # bytes, of triton_launch's starts


def run(
    weight: Tensor | Sequence[Tensor],
    asked: Problem,
    outputs: tuple[str, ...],
    global_amax: Any = None,
    importance: Any = None,
    hessian: Any = None,
    *,
    check_finite: bool,
    left: Findings | None = None,
) -> list[Tensor]:
    """The outputs of these names. Waits for the device only to check, and then not for the sweep itself.

    Args:
        weight: or several of one shape, dtype and strides, instead of the tensor that they would make with a
            new first axis: `fit_together` of this problem's says which.
        left: gets what there is to check, for a caller that looks at it later.

    Raises:
        ValueError: a weight or a global amax that was read is not finite, or an amax is negative; an
            importance or a hessian that does not fit or is not what it must be.
    """
    launch = _triton_launch()
    starts = None
    if isinstance(weight, Tensor):
        view = weight.reshape(asked.view_shape)  # copies only if no view can merge the axes
    else:
        starts, weight = _starts(weight), weight[0].expand(asked.shape)
        view = weight.view(asked.view_shape)
    device = weight.device
    own = findings(asked.view_shape[0], device) if check_finite else _NO_CONTEXT
    with _on_device(weight), own as watched:
        seen = watched or left
        given = None if global_amax is None else _device_amax(global_amax, weight, asked)
        weights = None if importance is None else _device_importance(importance, weight, asked)
        blocks = None if hessian is None else _device_hessian(hessian, weight, asked)
        found = launch.run(
            view,
            asked,
            outputs,
            lambda shape, dtype: torch.empty(shape, dtype=_DTYPES[dtype], device=device),
            given,
            starts=starts,
            importance=None if weights is None else weights.expand(asked.shape).reshape(asked.view_shape),
            hessian=blocks,
            checked=seen and seen.values,
            after_check=seen and seen.mark,
        )
        if watched:
            _check(watched.read(), weight, asked, weights, blocks)
    return list(found.values())


def fit_together(parts: Sequence[Tensor], one: Problem) -> bool:
    """Whether `run` takes these for one weight, as they lie. They have one shape, dtype and strides."""
    if len({part.data_ptr() % _UNIT for part in parts}) > 1 or is_capturing(parts[0]):
        return False
    try:
        parts[0].view(one.view_shape)
    except RuntimeError:  # no view can merge the axes
        return False
    return True


def _starts(parts: Sequence[Tensor]) -> Tensor:
    """Where each lies, as triton_launch takes it."""
    addresses = np.array([part.data_ptr() for part in parts])
    return torch.from_numpy((addresses - addresses[0]) // _UNIT).to(parts[0].device, non_blocking=True)


def is_capturing(weight: Tensor) -> bool:
    """A CUDA graph, which would keep the addresses of what is copied from the host."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def findings(matrices: int, device: torch.device) -> Findings:
    """Room for what is found of so many matrices."""
    return Findings(matrices, _triton_launch().CHECKED, device)


def bad_matrices(found: Findings) -> npt.NDArray[np.bool_]:
    """Of which matrices the weight or the global amax is not finite, or the amax negative. Waits."""
    largest, amax, *_ = np.reshape(found.read(), (-1, _triton_launch().CHECKED)).T
    good: npt.NDArray[np.bool_] = np.isfinite(largest) & np.isfinite(amax) & (amax >= 0)
    return ~good


def _check(
    found: Sequence[float], weight: Tensor, asked: Problem, importance: Tensor | None, hessian: Tensor | None
) -> None:
    """Raise what is wrong by these findings."""
    width = _triton_launch().CHECKED
    largest, amaxes, *hessians = (found[i::width] for i in range(width))
    if not all(map(math.isfinite, largest)):
        index = torch.nonzero(~torch.isfinite(weight))[0].tolist()
        raise problems.nonfinite_error("weight", index, weight[tuple(index)].item())
    if not all(0 <= amax < math.inf for amax in amaxes):
        values = np.array(amaxes, np.float32).reshape(asked.batch_shape)
        problems.global_amax_per_matrix(values, asked)
    if importance is not None and importance.numel():
        # Small, as a rule; where it is not, the least and the largest are two more passes over it.
        least, most = torch.aminmax(importance)
        if not (least >= 0 and most < math.inf):
            objectives.importance_view(to_numpy(importance), asked, check=True)
    if hessian is not None:
        zero, bad = (int(sum(counts)) for counts in hessians)
        if bad:
            objectives.hessian_per_matrix(to_numpy(hessian), asked, check=True)
        if zero:
            objectives.warn_of_zero_hessians(zero, asked)


def _device_amax(global_amax: Any, weight: Tensor, asked: Problem) -> Tensor:
    if isinstance(global_amax, Tensor) and global_amax.is_cuda:
        amax = global_amax.to(torch.float32)
        if amax.shape != asked.batch_shape:
            problems.check_global_amax_shape(tuple(amax.shape), asked)
            amax = amax.broadcast_to(asked.batch_shape)
        return amax.contiguous()
    values = problems.global_amax_per_matrix(to_numpy_if_tensor(global_amax), asked)
    return torch.from_numpy(values).to(weight.device)


def _device_importance(importance: Any, weight: Tensor, asked: Problem) -> Tensor:
    values = _device_floats("importance", importance, weight)
    objectives.check_importance_shape(tuple(values.shape), asked)
    return values


def _device_hessian(hessian: Any, weight: Tensor, asked: Problem) -> Tensor:
    values = _device_floats("hessian", hessian, weight)
    objectives.check_hessian_shape(tuple(values.shape), asked)
    return values.contiguous()


def _device_floats(name: str, values: Any, weight: Tensor) -> Tensor:
    """float32 where the weight is, of a tensor there or of what NumPy takes."""
    if not isinstance(values, Tensor):
        return torch.from_numpy(objectives.as_float32(name, values).copy()).to(weight.device)
    if values.is_complex() or values.dtype is torch.bool:
        raise TypeError(
            f"{name} has dtype {str(values.dtype).removeprefix('torch.')}: it must be real numbers"
        )
    return values.detach().to(torch.float32)


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
