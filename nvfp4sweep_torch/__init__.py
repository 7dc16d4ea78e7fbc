"""nvfp4sweep for PyTorch: the functions of `nvfp4sweep` for tensors, on the CPU and on CUDA.

CPU tensors reach the core's Numba engine in their own memory; CUDA tensors its Triton kernels, on the
current stream. Results live on the weight's device and carry no gradient. Under torch.compile the
functions become the operators torch.ops.nvfp4sweep.{calibrate, sweep, quantize}.

For users of NVIDIA ModelOpt: NVFP4MSECalibrator, nvfp4_fp8_scale_sweep, nvfp4_fp8_scale_sweep_hessian and
fp8_scale_candidates have the meaning that ModelOpt's pull requests 1387 and 1659 gave them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import nvfp4sweep
from nvfp4sweep import Sweep, ZeroHessianWarning, formats, problem
from nvfp4sweep_torch import _device, _distributed, _ops
from nvfp4sweep_torch._hessian import HessianAccumulator
from nvfp4sweep_torch._layout import is_dtensor
from nvfp4sweep_torch._many import calibrate_many, quantize_many
from nvfp4sweep_torch._observe import accumulate_hessians
from nvfp4sweep_torch._ops import Arrays, Options
from nvfp4sweep_torch._tensors import as_weight, to_numpy
from nvfp4sweep_torch.calibrator import (
    NVFP4MSECalibrator,
    fp8_scale_candidates,
    nvfp4_fp8_scale_sweep,
    nvfp4_fp8_scale_sweep_hessian,
)

__all__ = [
    "HessianAccumulator",
    "NVFP4MSECalibrator",
    "QuantizedTensor",
    "Sweep",
    "ZeroHessianWarning",
    "accumulate_hessians",
    "calibrate",
    "calibrate_many",
    "fp8_scale_candidates",
    "global_amax",
    "nvfp4_fp8_scale_sweep",
    "nvfp4_fp8_scale_sweep_hessian",
    "quantize",
    "quantize_many",
    "scale_candidates",
    "sweep",
]


@dataclass(frozen=True)
class QuantizedTensor:
    """An NVFP4 tensor; the fields of nvfp4sweep.QuantizedTensor as tensors on the weight's device."""

    packed: Tensor
    scale: Tensor
    global_scale: Tensor
    axis: int
    block_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that a runtime computes with: products in float32, then rounded to `dtype`."""
        if is_dtensor(self.packed):
            return _distributed.dequantize(self, dtype)
        codes = torch.stack([self.packed & 15, self.packed >> 4], dim=self.axis + 1)
        magnitudes = torch.tensor(formats.E2M1_VALUES, dtype=torch.float32, device=codes.device)
        values = torch.cat([magnitudes, -magnitudes])[codes.flatten(self.axis, self.axis + 1).int()]
        padding = (1,) * (self.scale.ndim - self.global_scale.ndim)
        scale = self.scale.float() * self.global_scale.reshape(self.global_scale.shape + padding)
        return (values * scale.repeat_interleave(self.block_size, dim=self.axis)).to(dtype)


def calibrate(
    weight: Tensor,
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: Any = None,
    hessian: Any = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
    process_group: Any = None,
) -> Tensor:
    """nvfp4sweep.calibrate for a tensor.

    Args:
        weight: dense float32, float16 or bfloat16 tensor of any strides on the CPU or a CUDA device;
            float64 is rounded to float32 first. Copied only if its axes cannot be merged by a view.
            A DTensor gives DTensors that lie as it does, if none of its shards cuts a block.
        global_amax, importance, hessian: a number, an array, or a tensor on the weight's device; for a
            DTensor the whole of it, or a DTensor that lies as the weight does.
        check_finite: raise ValueError on NaN or infinity. On CUDA this waits for the device; without
            it the call does not, and can be captured in a CUDA graph.
        implementation: "cpu" or "oracle" for CPU tensors, "triton" or "oracle" for CUDA tensors.
        process_group: a torch.distributed.ProcessGroup whose ranks each call this with a part of the same
            matrices, alike in their batch axes. They find the largest |w| of all of them by an all-reduce,
            and nothing else is communicated; with a global_amax nothing is. If one rank's part has NaN or
            infinity, all raise. Ranks with whole experts of their own need batch_dims=1, and no group.

    The other arguments, the errors and the source are those of nvfp4sweep.calibrate.

    Returns:
        float32 tensor on the weight's device, the weight's shape with `axis` divided by block_size.
    """
    options = Options(axis, block_size, batch_dims, min_code, check_finite, implementation)
    arrays = Arrays(weight, global_amax, importance, hessian)
    if _distributed.compiles(weight, process_group):
        return _ops.calibrate_op(*arrays.as_tensors(), *options)  # type: ignore[no-any-return]
    return _distributed.run(  # type: ignore[no-any-return]
        _ops.run_calibrate, arrays, options, process_group
    )


def sweep(
    weight: Tensor,
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: Any = None,
    hessian: Any = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
    process_group: Any = None,
) -> Sweep:
    """As `calibrate`, and also each block's E4M3 code, its error and the global amax.

    Returns:
        Sweep(amax float32, code uint8, error float32, global_amax float32) of tensors.
    """
    options = Options(axis, block_size, batch_dims, min_code, check_finite, implementation)
    arrays = Arrays(weight, global_amax, importance, hessian)
    if _distributed.compiles(weight, process_group):
        return Sweep(*_ops.sweep_op(*arrays.as_tensors(), *options))
    return Sweep(*_distributed.run(_ops.run_sweep, arrays, options, process_group))


def quantize(
    weight: Tensor,
    *,
    global_amax: Any = None,
    axis: int = -1,
    block_size: int = formats.BLOCK_SIZE,
    batch_dims: int = 0,
    importance: Any = None,
    hessian: Any = None,
    min_code: int = formats.MIN_CODE,
    check_finite: bool = True,
    implementation: str | None = None,
    process_group: Any = None,
) -> QuantizedTensor:
    """The weight in NVFP4 under the scales that `calibrate` finds; the same arguments and errors.

    Returns:
        QuantizedTensor(packed uint8, scale float8_e4m3fn, global_scale float32).
    """
    options = Options(axis, block_size, batch_dims, min_code, check_finite, implementation)
    arrays = Arrays(weight, global_amax, importance, hessian)
    if _distributed.compiles(weight, process_group):
        packed, code, scale = _ops.quantize_op(*arrays.as_tensors(), *options)
    else:
        packed, code, scale = _distributed.run(_ops.run_quantize, arrays, options, process_group)
    return QuantizedTensor(packed, code.view(torch.float8_e4m3fn), scale, axis % weight.ndim, block_size)


def global_amax(*weights: Tensor, batch_dims: int = 0, process_group: Any = None) -> Tensor:
    """nvfp4sweep.global_amax for tensors of one device: float32 of the batch axes' shape, there.

    process_group and DTensors are what they are for `calibrate`.
    """
    if weights and (process_group is not None or any(map(is_dtensor, weights))):
        return _distributed.global_amax(weights, batch_dims, process_group)
    tensors = [as_weight(weight) for weight in weights]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"weights are on several devices: {sorted(map(str, devices))}")
    if not tensors or tensors[0].device.type == "cpu":
        return torch.from_numpy(nvfp4sweep.global_amax(*map(to_numpy, tensors), batch_dims=batch_dims))
    amaxes = []
    for tensor in tensors:
        asked = problem.make_problem(tensor.shape, block_size=1, batch_dims=batch_dims)
        amaxes += _device.run(tensor, asked, ("global_amax",), check_finite=True)
    problem.check_same_batch([tuple(amax.shape) for amax in amaxes], batch_dims)
    return amaxes[0] if len(amaxes) == 1 else torch.stack(amaxes).amax(dim=0)


def scale_candidates() -> Tensor:
    """nvfp4sweep.scale_candidates as a tensor: float32 [126], the E4M3 values / 448."""
    return torch.from_numpy(nvfp4sweep.scale_candidates())
