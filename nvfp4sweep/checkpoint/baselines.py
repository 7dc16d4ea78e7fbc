"""The squared errors of the scales in common use, beside those of the exact ones.

In float64, a chunk of blocks at a time, and no code of an engine: the same arithmetic for every column
of a report.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ml_dtypes
import numba
import numpy as np
import numpy.typing as npt

from nvfp4sweep import formats
from nvfp4sweep.cpu import n_cores

#: The published 4/6 ("four over six") maps the global amax to 6 * 256, not to 6 * 448: a block whose
#: maximum becomes 4 then has a scale of up to 384, within E4M3.
FOUR_OVER_SIX_E4M3_MAX = 256.0

_CHUNK_BLOCKS = 4096  # whose errors are added up by themselves
_TASK_CHUNKS = 4  # so many threads seldom wait for the interpreter's lock

_E4M3_VALUES = formats.E4M3_VALUES  # a constant to Numba


class ScaleErrors(NamedTuple):
    """A weight's squared errors, summed over its blocks, and where the exact scales lie.

    Attributes:
        absmax: at the scales that take each block's maximum to 6.
        four_over_six: at the better of the scales that take it to 6 and to 4.
        exact: at the given codes.
        offsets: int64 [253]; how many blocks have the code `absmax code + i - 126`, at index i.
        codes: int64 [127]; how many blocks have the code i.
        clipped: how many blocks have an element beyond the amax of their given code.
    """

    absmax: float
    four_over_six: float
    exact: float
    offsets: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64]
    clipped: int


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

    def task(place: tuple[int, int]) -> list[ScaleErrors]:
        i, start = place
        part = slice(start, start + step)
        return _errors(blocks[i, part], codes[i, part], amaxes[i])

    step = _TASK_CHUNKS * _CHUNK_BLOCKS
    places = [(i, start) for i in range(matrices) for start in range(0, blocks.shape[1], step)]
    # `map` keeps the order, so sums do not vary.
    with ThreadPoolExecutor(n_cores()) as pool:
        return total([chunk for chunks in pool.map(task, places) for chunk in chunks])


def total(parts: Sequence[ScaleErrors]) -> ScaleErrors:
    return ScaleErrors(
        sum(part.absmax for part in parts),
        sum(part.four_over_six for part in parts),
        sum(part.exact for part in parts),
        np.sum([part.offsets for part in parts], axis=0, dtype=np.int64),
        np.sum([part.codes for part in parts], axis=0, dtype=np.int64),
        sum(part.clipped for part in parts),
    )


def absmax_code(block_amax: npt.NDArray[Any], global_amax: np.float32) -> npt.NDArray[np.uint8]:
    """The E4M3 codes nearest to block_amax / global_amax * 448, ties to even, within 1 .. 126."""
    ratio = formats.E4M3_MAX / np.float64(global_amax) if global_amax > 0 else 0.0
    flat = np.ascontiguousarray(block_amax, np.float64).reshape(-1) * ratio
    codes: npt.NDArray[np.uint8] = _nearest_codes(flat).reshape(block_amax.shape)
    return codes


def _errors(
    blocks: npt.NDArray[Any], code: npt.NDArray[np.uint8], global_amax: np.float32
) -> list[ScaleErrors]:
    """Of each chunk of these blocks."""
    amax = np.float64(global_amax)
    other = np.float64(np.float32(global_amax / np.float32(formats.E2M1_MAX * FOUR_OVER_SIX_E4M3_MAX)))
    chunks = -(-len(blocks) // _CHUNK_BLOCKS)
    sums = np.zeros((chunks, 3))
    offsets = np.zeros((chunks, 2 * formats.MAX_CODE + 1), np.int64)
    codes = np.zeros((chunks, formats.MAX_CODE + 1), np.int64)
    clipped = np.zeros(chunks, np.int64)
    _add_errors(
        _CHUNK_BLOCKS,
        _float32(blocks),
        code,
        formats.amax_by_code(global_amax),
        formats.scale_by_code(global_amax),
        formats.E4M3_MAX / amax if amax > 0 else 0.0,
        other,
        sums,
        offsets,
        codes,
        clipped,
    )
    return [
        ScaleErrors(float(s[0]), float(s[1]), float(s[2]), offsets[i], codes[i], int(clipped[i]))
        for i, s in enumerate(sums)
    ]


def _float32(blocks: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if blocks.dtype == ml_dtypes.bfloat16:  # whose own conversion keeps other threads waiting
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return blocks.astype(np.float32)


# --- Numba ----------------------------------------------------------------------------------------------


def _jit(*signature: str) -> Any:
    njit: Any = numba.njit  # whose types know no star
    # Sums may be reordered, and by that take vectors; nothing else that fastmath stands for.
    return njit(*signature, nogil=True, cache=bool(signature), error_model="numpy", fastmath={"reassoc"})


@_jit()
def _nearest_code(value):  # type: ignore[no-untyped-def]
    """Of the E4M3 values 1 .. 126 the nearest to a value >= 0, ties to the even code."""
    if value >= 448.0:
        return 126
    if value < 2.0**-6:
        return max(1, int(np.rint(value * 512.0)))
    # Float64's bits, rounded to three of the significand; its exponent counts from 1023, E4M3's from 7.
    bits = np.float64(value).view(np.int64)
    rounded = (bits + (1 << 48) - 1 + ((bits >> 49) & 1)) >> 49
    return rounded - ((1023 - 7) << 3)


@_jit("uint8[::1](float64[::1])")
def _nearest_codes(values):  # type: ignore[no-untyped-def]
    codes = np.empty(len(values), np.uint8)
    for i in range(len(values)):
        codes[i] = _nearest_code(values[i])
    return codes


@_jit()
def _squared_error(elements, scale):  # type: ignore[no-untyped-def]
    """sum_i min_q (|w_i| - q scale)^2 over the E2M1 points q."""
    inverse = 1 / scale if scale > 0 else 0.0
    error = 0.0
    for i in range(len(elements)):
        w = np.float64(abs(elements[i]))
        ratio = w * inverse
        # Neighbours among the E2M1 points are 0.5 apart below 2, 1 apart below 4, 2 apart up to 6.
        spacing = 0.5 if ratio < 2 else (1.0 if ratio < 4 else 2.0)
        steps = ratio * (2.0 if ratio < 2 else (1.0 if ratio < 4 else 0.5))
        residual = w - min(np.floor(steps + 0.5) * spacing, 6.0) * scale
        error += residual * residual
    return error


@_jit(
    "void(int64, float32[:,::1], uint8[::1], float32[::1], float32[::1], "
    "float64, float64, float64[:,::1], int64[:,::1], int64[:,::1], int64[::1])"
)
def _add_errors(  # type: ignore[no-untyped-def]
    chunk_blocks, blocks, code, amax_by_code, scale_by_code, ratio, four_over_six_scale,
    sums, offsets, codes, clipped,
):  # fmt: skip
    """Fill `sums` with each chunk's errors at absmax, by 4/6, at `code`; the rest are counts."""
    for chunk in range(len(sums)):
        absmax, four_over_six, exact = 0.0, 0.0, 0.0
        first = chunk * chunk_blocks
        for block in range(first, min(first + chunk_blocks, len(blocks))):
            elements = blocks[block]
            largest = np.float32(0)
            for i in range(len(elements)):
                largest = max(largest, abs(elements[i]))
            usual, chosen = _nearest_code(largest * ratio), code[block]
            absmax += _squared_error(elements, np.float64(scale_by_code[usual]))
            exact += _squared_error(elements, np.float64(scale_by_code[chosen]))
            at_six, at_four = 0.0, 0.0
            if four_over_six_scale > 0:
                scaled = largest / four_over_six_scale
                at_six = _E4M3_VALUES[_nearest_code(scaled / 6)] * four_over_six_scale
                at_four = _E4M3_VALUES[_nearest_code(scaled / 4)] * four_over_six_scale
            four_over_six += min(_squared_error(elements, at_six), _squared_error(elements, at_four))
            offsets[chunk, np.int64(chosen) - usual + 126] += 1
            codes[chunk, chosen] += 1
            clipped[chunk] += largest > amax_by_code[chosen]
        sums[chunk] = absmax, four_over_six, exact
