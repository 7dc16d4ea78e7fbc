"""Which codes can have the least squared error, by float32 and a proven margin.

The margin. XLA has no guaranteed fma, contracts as it likes, divides approximately and flushes
subnormals, so theorem 4 (nvfp4sweep/window.py) does not hold here. Let u = 2^-24, s the true scale of a
code, W = sum w^2, and y the computed |w| / s.
 1. The scale used is s (1 + a), |a| <= 8 u: s is three roundings of v G / 2688, the scale used is three
    others. Its reciprocal is off by another 8 u at most. So y is off by 18 u y at most, roundings included.
 2. q is a point nearest to y, or to another rounding of the same product. So |y - q| is at most 4 u y above
    min |y - q|, and s |y - q|, rounded once more, is within 24 u |w| of min_q ||w| - q s|.
 3. By the triangle inequality the root of sum (s (y - q))^2 is within 24 u sqrt(W) of sqrt(e). Squares,
    their sum in whatever order, the square of the scale used and the product with it move the root by
    (8 + 0.51 (n + 4)) u sqrt(W) at most, as e <= W.
 4. Squares of y that are flushed to zero add less than s^2 n 2^-125 to e, nothing beside u sqrt(W), as
    W >= (s / 4)^2. A w that is flushed itself is below s / 4 for every s and adds w^2 to all errors alike.
Hence |sqrt(computed e) - sqrt(e)| <= (35 + 0.51 n) u sqrt(W), and a code whose computed error exceeds
(sqrt(least) + 2 (42 + 0.51 n) u sqrt(W))^2 is not the answer; the difference of 14 u sqrt(W) covers the
rounding of this bound, which is at most 7 u sqrt(least).

The points. q = m - (m - y), with the m that neighbouring codes share ("One rounder for three codes" in
docs/mathematics.md); XLA cannot fold this while m depends on the data. It is a nearest point for y <= 7.
Beyond, q is a multiple of 2 or more, and |y - q| <= y - 6 for every such m: cut at 6 q is the nearest point,
and uncut the error is a lower bound. Only the first codes of a window are cut. At the others M <= 7 s, unless
M exceeds what E4M3 reaches: then they are kept by their lower bounds, which do not count as the least. Where
few codes below E4M3's end are concerned, what the largest element lacks is added: with y = M / s that is
(y - 6)^2 - (y - 8)^2 = 4 y - 28 up to y = 10, and 12 or more beyond.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep.problem import Problem
from nvfp4sweep.window import (
    CLIPPING_RATIO,
    FIRST_NORMAL_CODE,
    FIRST_UNDOUBLED_CODE,
    LEAST_GLOBAL_AMAX,
    SHARED_ROUNDER_FLOOR,
    SHARED_ROUNDER_SLOPE,
    last_unhalved_code,
    most_candidates,
    window,
)
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax import _words
from nvfp4sweep_jax._blocks import block_view, reader, tree

Array = jax.Array

_INFINITY = np.float32(np.inf)
_LARGEST_RELATIVE_PEAK = 2.0**40
#: So many codes from a normal one on the scale is doubled. Every window has so many codes at least, where
#: min_code allows.
_OCTAVE = 8
#: Over so many codes a rounder is moved by products: its floor, 1.95, shrinks by 15 / 8 at most.
_ROUNDER_REACH = 7


def screen(weight: Array, amax_bits: Array, problem: Problem) -> Array:
    """The codes left of each block, as words."""
    size = problem.block_size
    element = reader(weight, problem)
    shift, unit = _normalized(amax_bits)
    magnitudes = [exact.from_bits(exact.magnitude_bits(element(i))) for i in range(size)]
    peak = tree(jnp.maximum, magnitudes) * shift
    first, last = _window(peak, unit, problem)

    slots = most_candidates(size)
    uncut = _first_uncut_slot(size)
    scales = [exact.e4m3_float32_after(first, j) * unit for j in range(slots)]
    areas = [scale * scale for scale in scales]
    inverses = [1 / scale for scale in scales[:_OCTAVE]]
    inverses += [inverse * np.float32(0.5) for inverse in inverses[: slots - _OCTAVE]]
    ys = [[w * (inverse * shift) for w in magnitudes] for inverse in inverses]
    errors = []
    for j, rounders in enumerate(_rounders(ys, scales, inverses)):
        squares = [_squared_residual(y, m, j < uncut) for y, m in zip(ys[j], rounders, strict=True)]
        error = tree(jnp.add, squares) * areas[j]
        if j >= _OCTAVE or problem.min_code > FIRST_UNDOUBLED_CODE:
            error = jnp.where(first + j <= last, error, _INFINITY)
        errors.append(error)

    least = tree(jnp.minimum, errors[:uncut])
    for j in range(uncut, slots):
        if j <= uncut + 4:  # where the last of these is not valid those behind it do not matter
            highest = peak * inverses[j]
            is_valid = highest <= np.float32(CLIPPING_RATIO)
        least = jnp.minimum(least, jnp.where(is_valid, errors[j], _INFINITY))
        if j < uncut + 3:
            errors[j] += jnp.clip(highest * np.float32(4 * (1 - 2.0**-18)) - 28, 0, 12) * areas[j]
    root = jnp.sqrt(tree(jnp.add, [y * y for y in ys[0]])) * scales[0]
    limit = jnp.square(jnp.sqrt(least) + np.float32((84 + 1.02 * size) * 2.0**-24) * root)
    mask = tree(jnp.bitwise_or, [jnp.where(error <= limit, 1 << j, 0) for j, error in enumerate(errors)])
    fits = (first >= FIRST_NORMAL_CODE) & (last < first + slots)
    fits &= peak <= np.float32(_LARGEST_RELATIVE_PEAK)
    word = jnp.where(fits, _words.from_mask(first, mask), _words.from_range(first, last))
    return _with_exceptions(word, peak, unit, amax_bits, problem)


def whole_window(weight: Array, amax_bits: Array, problem: Problem) -> Array:
    """All codes of the window of each block."""
    shift, unit = _normalized(amax_bits)
    peak = (
        exact.from_bits(jnp.max(exact.magnitude_bits(block_view(weight, problem)), axis=problem.axis + 1))
        * shift
    )
    word = _words.from_range(*_window(peak, unit, problem))
    return _with_exceptions(word, peak, unit, amax_bits, problem)


def _rounders(ys: list[list[Array]], scales: list[Array], inverses: list[Array]) -> list[list[Array]]:
    """m for the elements at each slot: made at the middle one of three slots at most, or moved there."""
    found: list[list[Array]] = []
    origin = before = 0
    for group in np.array_split(np.arange(len(ys)), -(-len(ys) // 3)):
        middle = int(group[(len(group) - 1) // 2])
        if found and middle <= origin + _ROUNDER_REACH:
            rounders = [m * (scales[before] * inverses[middle]) for m in found[-1]]
        else:
            origin = middle
            # Floats from 2^22 to 2^23 are a half apart.
            slope, floor = (np.float32(2.0**22 * x) for x in (SHARED_ROUNDER_SLOPE, SHARED_ROUNDER_FLOOR))
            rounders = [jnp.maximum(y * slope, floor) for y in ys[middle]]
        before = middle
        found += [rounders] * len(group)
    return found


def _squared_residual(y: Array, rounder: Array, cut: bool) -> Array:
    q = rounder - (rounder - y)
    residual = y - (jnp.minimum(q, np.float32(6)) if cut else q)
    return residual * residual


def _first_uncut_slot(block_size: int) -> int:
    """From so many codes after M / lower_ratio on, where normal codes begin, M is below 7 s."""
    values = formats.E4M3_VALUES[FIRST_NORMAL_CODE : FIRST_NORMAL_CODE + 16]
    for step in range(1, 8):
        if (values[step:] / values[:-step]).min() * window(block_size).lower * CLIPPING_RATIO > 1:
            return step
    raise ValueError(f"block_size={block_size} has too wide a window")


def _normalized(amax_bits: Array) -> tuple[Array, Array]:
    """A power of two that brings a normal global amax into [1, 64), and that amax / 2688."""
    # Quotients of it stay normal, in whatever order they are computed.
    shift = exact.from_bits(jnp.maximum(254 - (amax_bits >> 23), 5) << 23)
    return shift, exact.from_bits(amax_bits) * shift * np.float32(1 / formats.NVFP4_MAX)


def _window(peak: Array, unit: Array, problem: Problem) -> tuple[Array, Array]:
    """The first and the last code of each block's window."""
    bounds = window(problem.block_size)
    inverse_unit = 1 / unit
    low = _code_at_least(peak * (np.float32(bounds.lower) * inverse_unit))
    high = _code_at_least(peak * (np.float32(bounds.upper) * inverse_unit)) - 1
    first = jnp.clip(low, problem.min_code, max(problem.min_code, FIRST_UNDOUBLED_CODE))
    return first, jnp.clip(high, last_unhalved_code(problem.min_code), formats.MAX_CODE)


def _code_at_least(value: Array) -> Array:
    """The lowest E4M3 code whose value is >= value; beyond 126 where there is none."""
    uniform = jnp.ceil(jnp.minimum(value, np.float32(2.0**-6)) * np.float32(512)).astype(jnp.int32)
    bits = lax.bitcast_convert_type(value, jnp.int32)
    normal = (jnp.minimum(bits, exact.INF_BITS) + 0xFFFFF >> 20) - formats.E4M3_TO_FLOAT32
    return jnp.where(value < np.float32(2.0**-6), uniform, normal)


def _with_exceptions(word: Array, peak: Array, unit: Array, amax_bits: Array, problem: Problem) -> Array:
    # Theorem 3, rounded to the safe side; a global amax that is not finite has no right answer.
    least_scale = np.float32(formats.E4M3_VALUES[problem.min_code] * (0.25 - 2.0**-20)) * unit
    trivial = (peak <= least_scale) | (amax_bits == 0) | (amax_bits >= exact.INF_BITS)
    # Compared as bits, as subnormals may count as 0 otherwise.
    unbounded = (amax_bits < int(np.float32(LEAST_GLOBAL_AMAX).view(np.int32))) & (amax_bits > 0)
    lowest = jnp.int32(problem.min_code)
    word = jnp.where(trivial, _words.from_mask(lowest, 1), word)
    return jnp.where(unbounded, _words.from_range(lowest, jnp.int32(formats.MAX_CODE)), word)
