"""The squared errors of the scales in common use, beside those of the exact ones.

Plain NumPy in float64, a chunk of blocks at a time, and no code of an engine: the same arithmetic
for every column of a report.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvfp4sweep import formats

#: The published 4/6 ("four over six") maps the global amax to 6 * 256, not to 6 * 448: a block whose
#: maximum becomes 4 then has a scale of up to 384, within E4M3.
FOUR_OVER_SIX_E4M3_MAX = 256.0

_CHUNK_BLOCKS = 4096

_Float64 = npt.NDArray[np.float64]


class ScaleErrors(NamedTuple):
    """A weight's squared errors, summed over its blocks, and where the exact scales lie.

    Attributes:
        absmax: at the scales that take each block's maximum to 6.
        four_over_six: at the better of the scales that take it to 6 and to 4.
        exact: at the given codes.
        offsets: int64 [253]; how many blocks have the code `absmax code + i - 126`, at index i.
    """

    absmax: float
    four_over_six: float
    exact: float
    offsets: npt.NDArray[np.int64]


def scale_errors(
    weight: npt.NDArray[Any], code: npt.NDArray[np.uint8], global_amax: npt.NDArray[np.float32]
) -> ScaleErrors:
    """Compare a weight's exact scales with the usual ones.

    Args:
        weight: float32, float16 or bfloat16 [..., K], contiguous; blocks of 16 along the last axis.
        code: uint8 [..., K / 16], the chosen E4M3 codes.
        global_amax: float32, the shape of the leading axes that stack matrices ([] or [E]).
    """
    matrices = max(1, global_amax.size)
    blocks = weight.reshape(matrices, -1, formats.BLOCK_SIZE)
    codes = code.reshape(matrices, -1)
    amaxes = global_amax.reshape(matrices)

    def chunk(place: tuple[int, int]) -> ScaleErrors:
        i, start = place
        part = slice(start, start + _CHUNK_BLOCKS)
        return _chunk_errors(blocks[i, part], codes[i, part], amaxes[i])

    places = [(i, start) for i in range(matrices) for start in range(0, blocks.shape[1], _CHUNK_BLOCKS)]
    # NumPy leaves the interpreter lock in its loops. `map` keeps the order, so sums do not vary.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return total(list(pool.map(chunk, places)))


def total(parts: Sequence[ScaleErrors]) -> ScaleErrors:
    return ScaleErrors(
        sum(part.absmax for part in parts),
        sum(part.four_over_six for part in parts),
        sum(part.exact for part in parts),
        np.sum([part.offsets for part in parts], axis=0, dtype=np.int64),
    )


def absmax_code(block_amax: npt.NDArray[Any], global_amax: np.float32) -> npt.NDArray[np.uint8]:
    """The E4M3 codes nearest to block_amax / global_amax * 448, ties to even, within 1 .. 126."""
    if global_amax == 0:
        return np.full(block_amax.shape, formats.MIN_CODE, np.uint8)
    return _nearest_e4m3(block_amax * (formats.E4M3_MAX / np.float64(global_amax)))


def four_over_six_scales(block_amax: npt.NDArray[Any], global_amax: np.float32) -> tuple[_Float64, _Float64]:
    """The two scales of each block that 4/6 tries: its maximum at 6, and at 4."""
    global_scale = np.float32(global_amax / np.float32(formats.E2M1_MAX * FOUR_OVER_SIX_E4M3_MAX))
    if global_scale == 0:
        return np.zeros(block_amax.shape), np.zeros(block_amax.shape)
    scaled = block_amax / np.float64(global_scale)
    at_six, at_four = (formats.E4M3_VALUES[_nearest_e4m3(scaled / largest)] for largest in (6.0, 4.0))
    return at_six * np.float64(global_scale), at_four * np.float64(global_scale)


def squared_error(magnitude: _Float64, scale: npt.NDArray[Any]) -> _Float64:
    """sum_i min_q (|w_i| - q scale)^2 over the E2M1 points q, for each block.

    Args:
        magnitude: float64 [blocks, 16], |w|.
        scale: [blocks], >= 0.

    Returns:
        float64 [blocks].
    """
    scale = scale.astype(np.float64)[:, None]
    ratio = magnitude / np.where(scale > 0, scale, 1.0)
    # Neighbours among the E2M1 points are 0.5 apart below 2, 1 apart below 4, 2 apart up to 6.
    spacing = np.where(ratio < 2, 0.5, np.where(ratio < 4, 1.0, 2.0))
    nearest = np.minimum(np.rint(ratio / spacing) * spacing, formats.E2M1_MAX)
    errors: _Float64 = np.square(magnitude - nearest * scale).sum(axis=1)
    return errors


def _chunk_errors(
    blocks: npt.NDArray[Any], code: npt.NDArray[np.uint8], global_amax: np.float32
) -> ScaleErrors:
    magnitude = np.abs(blocks.astype(np.float64))
    block_amax = magnitude.max(axis=1)
    scale = formats.scale_by_code(global_amax)
    usual = absmax_code(block_amax, global_amax)
    at_six, at_four = four_over_six_scales(block_amax, global_amax)
    better = np.minimum(squared_error(magnitude, at_six), squared_error(magnitude, at_four))
    return ScaleErrors(
        float(squared_error(magnitude, scale[usual]).sum()),
        float(better.sum()),
        float(squared_error(magnitude, scale[code]).sum()),
        np.bincount(code.astype(np.int64) - usual + formats.MAX_CODE, minlength=2 * formats.MAX_CODE + 1),
    )


def _nearest_e4m3(value: _Float64) -> npt.NDArray[np.uint8]:
    code = np.minimum(value, formats.E4M3_MAX).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return np.maximum(code, np.uint8(formats.MIN_CODE))
