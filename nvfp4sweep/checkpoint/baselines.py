"""The squared errors of the scales in common use, beside those of the exact ones.

In float64, a chunk of blocks at a time, and no code of an engine: the same arithmetic for every column
of a report.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from nvfp4sweep import formats
from nvfp4sweep.cpu import n_cores

#: The published 4/6 ("four over six") maps the global amax to 6 * 256, not to 6 * 448: a block whose
#: maximum becomes 4 then has a scale of up to 384, within E4M3.
FOUR_OVER_SIX_E4M3_MAX = 256.0

_CHUNK_BLOCKS = 4096  # whose errors are added up by themselves
_LEAST_CHUNKS = 16  # a task, of some milliseconds

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
    # Not as numbers: NumPy's conversions would take memory, and for bfloat16 keep other threads waiting.
    bits = weight.view(f"u{weight.itemsize}").reshape(matrices, -1, formats.BLOCK_SIZE)
    codes = code.reshape(matrices, -1)
    amaxes = global_amax.reshape(matrices)
    chunks = -(-bits.shape[1] // _CHUNK_BLOCKS)
    tables = [_tables(amax) for amax in amaxes]
    found = _Found.of(matrices, chunks)

    def add(place: tuple[int, int]) -> None:
        i, start = place
        chunks = slice(start, start + step)
        blocks = slice(start * _CHUNK_BLOCKS, (start + step) * _CHUNK_BLOCKS)
        _add_errors(
            _CHUNK_BLOCKS,
            bits[i, blocks],
            weight.dtype == np.float16,
            codes[i, blocks],
            *tables[i],
            *(array[i, chunks] for array in found),
        )

    # A thread has one task: to start them, and to wait for each other in the interpreter, takes them longer
    # than the work where they have many.
    step = max(_LEAST_CHUNKS, -(-chunks // n_cores()))
    places = [(i, start) for i in range(matrices) for start in range(0, chunks, step)]
    with ThreadPoolExecutor(min(n_cores(), max(1, len(places)))) as pool:
        list(pool.map(add, places))
    return found.total()


class _Found(NamedTuple):
    """By matrix and chunk: what a task fills does not depend on the number of tasks, nor do the sums."""

    errors: npt.NDArray[np.float64]  # at absmax, by 4/6, at the given codes
    offsets: npt.NDArray[np.int64]
    codes: npt.NDArray[np.int64]
    clipped: npt.NDArray[np.int64]

    @staticmethod
    def of(matrices: int, chunks: int) -> "_Found":
        def zeros(width: int, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
            return np.zeros((matrices, chunks, width), dtype)

        offsets, codes = zeros(2 * formats.MAX_CODE + 1), zeros(formats.MAX_CODE + 1)
        return _Found(zeros(3, np.float64), offsets, codes, zeros(1))

    def total(self) -> ScaleErrors:
        absmax, four_over_six, exact = (math.fsum(self.errors[..., i].flat) for i in range(3))
        offsets, codes, clipped = (counts.sum(axis=(0, 1)) for counts in self[1:])
        return ScaleErrors(absmax, four_over_six, exact, offsets, codes, int(clipped[0]))


def _tables(global_amax: np.float32) -> tuple[Any, ...]:
    """What _add_errors takes of a matrix."""
    return (
        formats.amax_by_code(global_amax),
        formats.scale_by_code(global_amax),
        _ratio(global_amax),
        np.float64(np.float32(global_amax / np.float32(formats.E2M1_MAX * FOUR_OVER_SIX_E4M3_MAX))),
    )


def _ratio(global_amax: np.float32) -> float:
    """From a block's amax to its scale by absmax, among the values of E4M3."""
    return float(formats.E4M3_MAX / np.float64(global_amax)) if global_amax > 0 else 0.0


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
    flat = np.ascontiguousarray(block_amax, np.float64).reshape(-1) * _ratio(global_amax)
    codes: npt.NDArray[np.uint8] = _nearest_codes(flat).reshape(block_amax.shape)
    return codes


# --- Numba ----------------------------------------------------------------------------------------------


def _jit(*signature: str) -> Any:
    njit: Any = numba.njit  # whose types know no star
    # Sums may be reordered, and by that take vectors; nothing else that fastmath stands for.
    options = {"nogil": True, "cache": bool(signature), "error_model": "numpy", "fastmath": {"reassoc"}}
    return njit(list(signature) or None, **options)


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
def _squared_error(magnitudes, scale):  # type: ignore[no-untyped-def]
    """sum_i min_q (|w_i| - q scale)^2 over the E2M1 points q."""
    inverse = 1 / scale if scale > 0 else 0.0
    error = 0.0
    for i in range(len(magnitudes)):
        w = np.float64(magnitudes[i])
        ratio = w * inverse
        # Neighbours among the E2M1 points are 0.5 apart below 2, 1 apart below 4, 2 apart up to 6.
        spacing = 0.5 if ratio < 2 else (1.0 if ratio < 4 else 2.0)
        steps = ratio * (2.0 if ratio < 2 else (1.0 if ratio < 4 else 0.5))
        residual = w - min(np.floor(steps + 0.5) * spacing, 6.0) * scale
        error += residual * residual
    return error


_ADDED = (
    "boolean, uint8[::1], float32[::1], float32[::1], float64, float64, "
    "float64[:,::1], int64[:,::1], int64[:,::1], int64[:,::1]"
)


@_jit(f"void(int64, uint16[:,::1], {_ADDED})", f"void(int64, uint32[:,::1], {_ADDED})")
def _add_errors(  # type: ignore[no-untyped-def]
    chunk_blocks, blocks, is_float16, code, amax_by_code, scale_by_code, ratio, four_over_six_scale,
    errors, offsets, codes, clipped,
):  # fmt: skip
    """Add what is found of the blocks, given by their bits, to what there is of their chunks."""
    magnitudes = np.empty(blocks.shape[1], np.float32)
    bits = magnitudes.view(np.uint32)
    mask = np.uint32(0x7FFF if blocks.itemsize == 2 else 0x7FFFFFFF)
    shift = np.uint32(0 if blocks.itemsize == 4 else (13 if is_float16 else 16))
    # A float16's exponent counts from 15, a float32's from 127.
    unit = np.float32(2.0**112 if is_float16 else 1.0)
    for block in range(len(blocks)):
        largest = np.float32(0)
        for i in range(len(bits)):
            bits[i] = (np.uint32(blocks[block, i]) & mask) << shift
        for i in range(len(bits)):
            magnitudes[i] *= unit
            largest = max(largest, magnitudes[i])
        chunk = block // chunk_blocks
        usual, chosen = _nearest_code(largest * ratio), code[block]
        absmax = _squared_error(magnitudes, np.float64(scale_by_code[usual]))
        exact = absmax
        if chosen != usual:
            exact = _squared_error(magnitudes, np.float64(scale_by_code[chosen]))
        at_six, at_four = 0.0, 0.0
        if four_over_six_scale > 0:
            scaled = largest / four_over_six_scale
            at_six = _E4M3_VALUES[_nearest_code(scaled / 6)] * four_over_six_scale
            at_four = _E4M3_VALUES[_nearest_code(scaled / 4)] * four_over_six_scale
        errors[chunk, 0] += absmax
        errors[chunk, 1] += min(_squared_error(magnitudes, at_six), _squared_error(magnitudes, at_four))
        errors[chunk, 2] += exact
        offsets[chunk, np.int64(chosen) - usual + 126] += 1
        codes[chunk, chosen] += 1
        clipped[chunk, 0] += largest > amax_by_code[chosen]
