"""What the CUDA engine returns for a weight to be timed, against the oracle."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import nvfp4sweep
import nvfp4sweep_torch
from benchmarks import gate

_SAMPLE = 65_536  # blocks


def every_block(w: torch.Tensor, global_amax: torch.Tensor) -> npt.NDArray[np.uint8]:
    """The oracle's codes, after every function returned them, with and without check and global amax.

    Packed codes are compared for rows spread over the weight.
    """
    amax = np.float32(global_amax.item())
    codes = gate.oracle_codes(_host(w), amax)
    block_amax = nvfp4sweep.scale_candidates()[codes - 1] * amax
    rows = _spread(w, 0)
    part = _host(w.index_select(0, rows))
    packed = nvfp4sweep.quantize(part, global_amax=amax, implementation="oracle").packed

    gate.require_equal("global_amax", _host(nvfp4sweep_torch.global_amax(w)), np.array(amax))
    given: dict[str, Any] = {"check_finite": False, "global_amax": global_amax}
    for options in ({}, {"check_finite": False}, given):
        what = f"({w.dtype}, {', '.join(options)})"
        gate.require_equal(f"calibrate{what}", _host(nvfp4sweep_torch.calibrate(w, **options)), block_amax)
        gate.require_equal(f"sweep{what}", _host(nvfp4sweep_torch.sweep(w, **options).code), codes)
        stored = nvfp4sweep_torch.quantize(w, **options)
        gate.require_equal(f"quantize{what}", _host(stored.scale.view(torch.uint8)), codes)
        gate.require_equal(f"quantize{what} packed", _host(stored.packed.index_select(0, rows)), packed)
    return codes


def sample(
    what: str, w: torch.Tensor, global_amax: torch.Tensor, dim: int = 0, blocks: int = _SAMPLE, **options: Any
) -> int:
    """The number of blocks compared, in slices spread along `dim`, across which no block lies."""
    return slices(what, w, global_amax, _spread(w, dim, blocks), dim, **options)


def _spread(w: torch.Tensor, dim: int, blocks: int = _SAMPLE) -> torch.Tensor:
    length = w.shape[dim]
    number = min(length, max(1, blocks * 16 * length // w.numel()))
    return torch.linspace(0, length - 1, number, device=w.device).round().long()


def slices(
    what: str, w: torch.Tensor, global_amax: torch.Tensor, index: torch.Tensor, dim: int = 0, **options: Any
) -> int:
    """The number of blocks compared, in these slices along `dim`: amaxes, codes and errors."""
    on_host: dict[str, Any] = {
        name: _host(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()
    }
    expected = nvfp4sweep.sweep(
        _host(w.index_select(dim, index)), global_amax=_host(global_amax), implementation="oracle", **on_host
    )
    given: dict[str, Any] = {"global_amax": global_amax, "check_finite": False, **options}
    swept = nvfp4sweep_torch.sweep(w, **given)
    calibrated = nvfp4sweep_torch.calibrate(w, **given)

    def compare(name: str, got: torch.Tensor, values: npt.NDArray[Any]) -> int:
        return gate.require_equal(f"{what}: {name}", _host(got.index_select(dim, index)), values)

    compare("calibrate", calibrated, expected.amax)
    compare("sweep's amax", swept.amax, expected.amax)
    compare("sweep's error", swept.error, expected.error)
    return compare("sweep's code", swept.code, expected.code)


def _host(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """NumPy has no bfloat16; float32 holds its values."""
    plain = tensor.float() if tensor.is_floating_point() else tensor
    return plain.cpu().numpy()
