"""NVIDIA ModelOpt, which is optional: its fused sweep and its reference calibrator of 126 passes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import mse_loss

from nvfp4sweep import formats

Peer = Callable[..., torch.Tensor]  # (weight, global_amax) -> block amax


def load() -> dict[str, Peer]:
    """By name; empty without ModelOpt.

    The fused sweep waits for the device once a call, to list its candidates: its time holds a few launches.
    """
    try:
        from modelopt.torch.kernels.quantization.gemm import (
            nvfp4_fp8_scale_sweep,
            static_blockwise_fp4_fake_quant,
        )
        from modelopt.torch.quantization.calib import NVFP4MSECalibrator
    except ImportError as error:
        print(f"ModelOpt is left out: {error}", flush=True)
        return {}
    reference = partial(_calibrate, NVFP4MSECalibrator, static_blockwise_fp4_fake_quant)
    return {"modelopt_sweep": nvfp4_fp8_scale_sweep, "modelopt_reference": reference}


def load_hessian() -> Peer | None:
    """ModelOpt's sweep with block Hessians: (weight, global_amax, hessian) -> block amax."""
    try:
        from modelopt.torch.kernels.quantization.gemm import nvfp4_fp8_scale_sweep_hessian
    except ImportError as error:
        print(f"ModelOpt is left out: {error}", flush=True)
        return None

    def run(weight: torch.Tensor, global_amax: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        return nvfp4_fp8_scale_sweep_hessian(weight.reshape(-1, 16), global_amax, hessian)  # type: ignore[no-any-return]

    return run


def _calibrate(
    calibrator_class: Any, fake_quantize: Any, weight: torch.Tensor, global_amax: torch.Tensor
) -> torch.Tensor:
    def quantize(x: torch.Tensor, amax: torch.Tensor) -> Any:
        # Every candidate is an E4M3 value already. To round it again would need a C++ build.
        return fake_quantize(x, amax, global_amax, quantize_block_scales=False)

    blocks = weight.reshape(-1, formats.BLOCK_SIZE)
    calibrator = calibrator_class(
        amax=torch.empty(len(blocks), device=weight.device),  # of which only the shape is used
        global_amax=global_amax,
        axis=0,
        quant_func=quantize,
        error_func=_squared_error,
    )
    calibrator.collect(blocks)
    return calibrator.compute_amax()  # type: ignore[no-any-return]


def _squared_error(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """ModelOpt's default. Given by name, it selects the reference instead of the fused sweep."""
    return mse_loss(x, quantized, reduction="none")


def codes(block_amax: torch.Tensor, global_amax: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The E4M3 codes that amaxes stand for, however their last bits were rounded."""
    ratio = block_amax.double().cpu().numpy() / global_amax.double().item() * formats.E4M3_MAX
    between = (formats.E4M3_VALUES[1:] + formats.E4M3_VALUES[:-1]) / 2
    return np.searchsorted(between, ratio).astype(np.uint8)
