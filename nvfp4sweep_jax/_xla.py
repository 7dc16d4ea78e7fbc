"""The XLA engine: plain jnp, exact, for anything that can be traced.

A weight is viewed as [..., blocks, block_size, ...] and its elements are read as block_size slices, so
that all arithmetic is elementwise over blocks: XLA vectorises it, fuses it into one loop and never
gathers a sharded weight.

The window (nvfp4sweep/window.py) is walked twice at most. `_screen` computes float32 errors and keeps
every code that its margin cannot exclude. `_settle` compares those that are left exactly, in float64
pairs (theorem 5), in a loop that does not run where every block has one code left.

The margin. XLA has no guaranteed fma, contracts as it likes, divides approximately and flushes
subnormals, so theorem 4 does not hold here. Let u = 2^-24, s the true scale of a code and W = sum w^2.
 1. The scale used is s (1 + a), |a| <= 8 u: s is three roundings of v G / 2688, the scale used is
    three others. Its reciprocal is off by another 8 u at most, the product y = w / s by u.
 2. So y is off by 18 u y at most, and the point q nearest to the y used satisfies
    |w - q s| <= min_q |w - q s| + 36 u w, wherever the point changes.
 3. q s <= 2.01 w, as q is nearest to y within rounding. So the computed residual is |w - q s| up to
    19 u w from q s and u (1 + 36 u) w from the subtraction: in all within 56.1 u w of the least residual.
 4. By the triangle inequality the root of the sum of squared residuals is within 56.1 u sqrt(W) of
    sqrt(e). Squaring and summing moves it by 0.51 (n + 1) u sqrt(W) at most, in whatever order.
 5. Weights are first multiplied by a power of two that brings G into [1, 4), exactly, so s >= 2^-21.
    Squares flushed to zero add at most sqrt(n 2^-125), below u sqrt(W) / 1000 as W >= (s / 4)^2. A w
    that is flushed itself is below s / 4 for every s and adds w^2 to all errors alike.
Hence |sqrt(computed e) - sqrt(e)| <= (56.2 + 0.51 (n + 1)) u sqrt(W), and a code whose computed error
exceeds (sqrt(least) + 2 (64 + n) u sqrt(W))^2 is not the answer; the difference of 7 u sqrt(W) or more
covers the rounding of this bound, which is at most 5 u sqrt(least) for n <= 32 and least <= 1.01 W.
Beyond the premises (global amax below LEAST_GLOBAL_AMAX, a block that exceeds it by 2^40, a window of
codes without room for it in `_screen`, n > 32) the whole window or all codes are compared exactly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep.problem import Problem
from nvfp4sweep.window import (
    FIRST_UNDOUBLED_CODE,
    LEAST_GLOBAL_AMAX,
    last_unhalved_code,
    most_candidates,
    window,
)
from nvfp4sweep_jax import _arithmetic as exact
from nvfp4sweep_jax._amax import absolute_maximum, as_float32
from nvfp4sweep_jax._operands import Found, Operands

Array = jax.Array

#: Larger blocks are compared exactly over their whole window, by a loop over their elements.
MAX_UNROLLED_BLOCK_SIZE = 32
_LARGEST_RELATIVE_PEAK = 2.0**40
_U = 2.0**-24


@partial(jax.jit, static_argnames=("problem", "outputs"))
def run(operands: Operands, problem: Problem, outputs: tuple[str, ...]) -> Found:
    """Search every block and compute the fields of Found named in `outputs`."""
    weight, global_amax = operands
    largest = None
    if global_amax is None or "largest" in outputs:
        largest = absolute_maximum(weight, problem)
        global_amax = largest if global_amax is None else global_amax
    view = _block_view(as_float32(weight), problem)
    given = global_amax.reshape(global_amax.shape + (1,) * (weight.ndim - problem.batch_dims))
    amax_bits = exact.magnitude_bits(given)
    if problem.block_size <= MAX_UNROLLED_BLOCK_SIZE:
        screened = _screen(view, amax_bits, problem)
    else:
        screened = _whole_window(view, amax_bits, problem)
    with jax.enable_x64(True):
        code = _settle(screened, view, amax_bits, problem)
        amax = exact.block_amax(code, exact.widen(amax_bits))
        scale = exact.block_scale(code, exact.widen(amax_bits))
        error = exact.round_to_float32(_error(view, scale, problem)) if "error" in outputs else None
        return Found(
            amax=exact.narrow(amax) if "amax" in outputs else None,
            code=code.astype(jnp.uint8) if "code" in outputs else None,
            error=None if error is None else exact.narrow(error),
            packed=_pack(view, scale, problem) if "packed" in outputs else None,
            global_amax=global_amax if "global_amax" in outputs else None,
            global_scale=exact.checkpoint_scale(global_amax) if "global_scale" in outputs else None,
            largest=largest if "largest" in outputs else None,
        )


# --- elements of a block --------------------------------------------------------------------------


def _block_view(x: Array, problem: Problem) -> Array:
    """[..., blocks, block_size, ...]: the block axis is never merged with another."""
    axis, size = problem.axis, problem.block_size
    return x.reshape(*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])


def _fold(
    view: Array, problem: Problem, step: Callable[[Any, Array], Any], start: Any, zero: Array | int = 0
) -> Any:
    """step(...step(step(start, w[0]), w[1])..., w[n - 1]) over the elements of every block."""
    axis = problem.axis + 1
    if problem.block_size <= MAX_UNROLLED_BLOCK_SIZE:
        for i in range(problem.block_size):
            start = step(start, lax.dynamic_index_in_dim(view, i + zero, axis, keepdims=False))
        return start
    return lax.fori_loop(
        0,
        problem.block_size,
        lambda i, state: step(state, lax.dynamic_index_in_dim(view, i, axis, keepdims=False)),
        start,
    )


def _elements(view: Array, problem: Problem) -> list[Array]:
    axis = problem.axis + 1
    return [lax.index_in_dim(view, i, axis, keepdims=False) for i in range(problem.block_size)]


def _tree(combine: Callable[[Array, Array], Array], terms: list[Array]) -> Array:
    while len(terms) > 1:
        pairs = [combine(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = pairs + terms[len(pairs) * 2 :]
    return terms[0]


# --- float32: which codes are left ----------------------------------------------------------------
#
# Per block one int32, so that XLA computes the screen once and not once an output:
# bits 0 .. 6 the first code, 7 .. 13 the number of codes from there, 14 .. 30 a mask of those left,
# where 0 means all of them.


def _packed(first: Array, count: Array, mask: Array) -> Array:
    return first | count << 7 | mask << 14


def _unpacked(screened: Array) -> tuple[Array, Array, Array]:
    return screened & 127, screened >> 7 & 127, screened >> 14


def _first_left(screened: Array) -> Array:
    first, _, mask = _unpacked(screened)
    return first + jnp.where(mask == 0, 0, _trailing_zeros(mask))


def _trailing_zeros(bits: Array) -> Array:
    return lax.population_count((bits & -bits) - 1)


def _screen(view: Array, amax_bits: Array, problem: Problem) -> Array:
    shift, unit = _normalized(amax_bits)
    magnitudes = [jnp.abs(w.astype(jnp.float32)) * shift for w in _elements(view, problem)]
    peak = _tree(jnp.maximum, magnitudes)
    first, count = _window(peak, unit, problem)
    fits = (first >= 8) & (peak <= np.float32(_LARGEST_RELATIVE_PEAK))

    slots = most_candidates(problem.block_size)
    errors = []
    for j in range(slots):
        scale = exact.e4m3_float32(first + j) * unit
        inverse = 1 / scale
        squares = []
        for w in magnitudes:
            residual = w - exact.nearest_e2m1(w, inverse) * scale
            squares.append(residual * residual)
        errors.append(jnp.where(j < count, _tree(jnp.add, squares), np.float32(np.inf)))
    least = _tree(jnp.minimum, errors)
    size = _tree(jnp.add, [w * w for w in magnitudes])
    limit = jnp.square(jnp.sqrt(least) + np.float32(2 * (64 + problem.block_size) * _U) * jnp.sqrt(size))
    mask = jnp.zeros_like(first)
    for j, error in enumerate(errors):
        mask |= jnp.where((error <= limit) & (j < count), 1 << j, 0)
    mask = jnp.where(fits & (count <= slots), mask, 0)
    return _with_exceptions(first, count, mask, peak, unit, amax_bits, problem)


def _whole_window(view: Array, amax_bits: Array, problem: Problem) -> Array:
    shift, unit = _normalized(amax_bits)
    peak = exact.from_bits(jnp.max(exact.magnitude_bits(view), axis=problem.axis + 1)) * shift
    first, count = _window(peak, unit, problem)
    return _with_exceptions(first, count, jnp.zeros_like(first), peak, unit, amax_bits, problem)


def _normalized(amax_bits: Array) -> tuple[Array, Array]:
    """A power of two that brings a normal global amax into [1, 4), and that amax / 2688."""
    shift = exact.from_bits(jnp.maximum(254 - (amax_bits >> 23), 1) << 23)
    return shift, exact.from_bits(amax_bits) * shift * np.float32(1 / formats.NVFP4_MAX)


def _window(peak: Array, unit: Array, problem: Problem) -> tuple[Array, Array]:
    """The first code of each block's window and the number of its codes."""
    bounds = window(problem.block_size)
    inverse_unit = 1 / unit
    low = _code_at_least(peak * (np.float32(bounds.lower) * inverse_unit))
    high = _code_at_least(peak * (np.float32(bounds.upper) * inverse_unit)) - 1
    first = jnp.clip(low, problem.min_code, max(problem.min_code, FIRST_UNDOUBLED_CODE))
    last = jnp.clip(high, last_unhalved_code(problem.min_code), formats.MAX_CODE)
    return first, last - first + 1


def _code_at_least(value: Array) -> Array:
    """The lowest E4M3 code whose value is >= value; beyond 126 where there is none."""
    uniform = jnp.ceil(jnp.minimum(value, np.float32(2.0**-6)) * np.float32(512)).astype(jnp.int32)
    bits = lax.bitcast_convert_type(value, jnp.int32)
    normal = (jnp.minimum(bits, exact.INF_BITS) + 0xFFFFF >> 20) - formats.E4M3_TO_FLOAT32
    return jnp.where(value < np.float32(2.0**-6), uniform, normal)


def _with_exceptions(
    first: Array, count: Array, mask: Array, peak: Array, unit: Array, amax_bits: Array, problem: Problem
) -> Array:
    # Theorem 3, rounded to the safe side; a global amax that is not finite has no right answer.
    least_scale = np.float32(formats.E4M3_VALUES[problem.min_code] * (0.25 - 2.0**-20)) * unit
    trivial = (peak <= least_scale) | (amax_bits == 0) | (amax_bits >= exact.INF_BITS)
    # Compared as bits, as subnormals may count as 0 otherwise.
    unbounded = amax_bits < int(np.float32(LEAST_GLOBAL_AMAX).view(np.int32))
    unbounded &= amax_bits > 0
    trivial &= ~unbounded
    exceptional = trivial | unbounded
    first = jnp.where(exceptional, problem.min_code, first)
    count = jnp.where(unbounded, formats.MAX_CODE + 1 - problem.min_code, jnp.where(trivial, 1, count))
    mask = jnp.where(count == 1, 1, jnp.where(unbounded, 0, mask))
    return _packed(first, count, mask)


# --- exact comparison (window.py, theorem 5) ------------------------------------------------------


def _settle(screened: Array, view: Array, amax_bits: Array, problem: Problem) -> Array:
    """int32 codes: the lowest of those left that has the least exact error."""
    global_amax = exact.widen(amax_bits)

    def rival(screened: Array, state: Array) -> tuple[Array, Array, Array]:
        """The best code so far, the next one to compare it with, and whether there is one."""
        first, count, mask = _unpacked(screened)
        start = _first_left(screened)
        best = jnp.where(state == 0, start, state & 127)
        done = jnp.where(state == 0, start, state >> 7)
        rest = jnp.where(mask == 0, -1, mask >> jnp.minimum(done - first + 1, 31))
        exists = (rest != 0) & (done < first + count - 1)
        return best, jnp.where(exists, done + 1 + _trailing_zeros(rest), done), exists

    def unsettled(carry: tuple[Array, Array, Array]) -> Array:
        return jnp.any(rival(*carry[:2])[2])

    def compare(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        screened, state, turn = carry
        best, code, exists = rival(screened, state)
        scales = [exact.block_scale(c, global_amax) for c in (best, code)]
        ours, theirs = _exact_objectives(view, scales, problem, jnp.minimum(turn, 0))
        return screened, jnp.where(exists & exact.less(theirs, ours), code, best) | code << 7, turn + 1

    # state: best | last compared << 7, and 0 before the first round. Made from `screened` so that it
    # has its sharding; one small array a round, so that XLA computes the objectives once.
    screened, state, _ = lax.while_loop(unsettled, compare, (screened, screened * 0, jnp.int32(0)))
    return jnp.where(state == 0, _first_left(screened), state & 127)


def _exact_objectives(
    view: Array, scales: list[Array], problem: Problem, zero: Array
) -> list[tuple[Array, Array]]:
    """s^2 B - 2 s A at each scale as a float64 pair: the error less its constant part.

    `zero` is 0, which XLA must not know: within a loop it would otherwise slice the weight beforehand, and
    write as much as it reads, whether the loop runs or not.
    """
    inverses = [exact.reciprocal(scale) for scale in scales]

    def add(sums: list[tuple[Array, Array]], w: Array) -> list[tuple[Array, Array]]:
        magnitude = exact.widen(exact.magnitude_bits(w))
        added = []
        for (a, b), inverse in zip(sums, inverses, strict=True):
            q = exact.nearest_e2m1(magnitude, inverse)
            added.append((a + magnitude * q, b + q * q))
        return added

    zeros = [(scale * 0, scale * 0) for scale in scales]
    objectives = []
    for scale, (a, b) in zip(scales, _fold(view, problem, add, zeros, zero), strict=True):
        # Every product is exact: scale has 24 bits, b 26 at most, a split half 27.
        square_high, square_low = exact.split(scale * scale)
        f_high, f_low = exact.two_sum(square_high * b, square_low * b)
        twice = -2 * scale
        top, bottom = exact.split(a)
        g_high, g_low = exact.two_sum(twice * top, twice * bottom)
        high, carry = exact.two_sum(f_high, g_high)
        objectives.append(exact.two_sum(high, (f_low + g_low) + carry))
    return objectives


# --- what follows from the codes ------------------------------------------------------------------


def _error(view: Array, scale: Array, problem: Problem) -> Array:
    """float64: the squared error summed element by element in order, as in the oracle."""
    inverse = exact.reciprocal(scale)

    def add(total: Array, w: Array) -> Array:
        magnitude = exact.widen(exact.magnitude_bits(w))
        residual = magnitude - exact.nearest_e2m1(magnitude, inverse) * scale
        # The minimum (with q = 0) is residual^2; it keeps XLA from contracting square and sum.
        return total + jnp.minimum(residual * residual, magnitude * magnitude)

    total: Array = _fold(view, problem, add, scale * 0)
    return total


def _pack(view: Array, scale: Array, problem: Problem) -> Array:
    """uint8 of problem.packed_shape: E2M1 codes as packing.encode defines them."""
    axis = problem.axis + 1
    bits = exact.float32_bits(view)
    magnitude = exact.widen(bits & exact.MAGNITUDE_MASK)
    wide = jnp.expand_dims(scale, axis)
    nibble = jnp.where(bits < 0, formats.E2M1_SIGN_BIT, 0).astype(jnp.uint8)
    for step, midpoint in enumerate(formats.E2M1_MIDPOINTS):
        edge = wide * float(midpoint)
        above = magnitude >= edge if step % 2 else magnitude > edge
        nibble += (above & (wide > 0)).astype(jnp.uint8)
    even, odd = (lax.slice_in_dim(nibble, i, None, 2, axis) for i in (0, 1))
    return (even | odd << 4).reshape(problem.packed_shape)
