"""float32 arithmetic in IEEE rounding, subnormals included, that no XLA backend changes.

XLA on a CPU flushes subnormals, divides by constants with a reciprocal, may drop a conversion to
float32 and back, and may contract a product and a sum into one fused operation. So float32 values are
held as float64 here, read from and written to their bits, and rounded by `lax.reduce_precision`.
Every product that meets a sum is exact, so a contraction changes nothing.

Divisions by d = 6, 448 and 2688 are products with float64(1/d) = (1 - 2^-54) / d. Where x / d is a
float64 the product rounds to just that, midpoints of float32 included. Elsewhere x / d is at least
2^-36 away from a midpoint, relatively, and the product is on the right side of it.

All functions are elementwise. Those that make float64 must run inside `jax.enable_x64(True)`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from nvfp4sweep import formats
from nvfp4sweep.window import ROUNDER_BASE, ROUNDER_SLOPE

Array = jax.Array
#: The sum of two float64, of which the second is at most half a unit in the last place of the first.
Pair = tuple[Array, Array]

INF_BITS = 0x7F800000
MAGNITUDE_MASK = 0x7FFFFFFF
SMALLEST_NORMAL_BITS = 0x00800000
_SMALLEST_NORMAL = 2.0**-126
_HOLDS_BITS = jax.__version_info__ < (0, 11)
_SUBNORMAL_STEP = 2.0**-149
_SMALLEST_NORMAL_CODE = 8


def hold(x: Array) -> Array:
    """An array to slice and gather. Older XLA makes these operations on bfloat16 float32 ones on a CPU, and
    the whole array with them: it takes the bits."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 and _HOLDS_BITS else x


def float32_bits(x: Array) -> Array:
    """int32 bits of a float32, float16 or bfloat16 array, or one that `hold` gave, widened to float32."""
    if x.dtype == jnp.bfloat16:
        x = lax.bitcast_convert_type(x, jnp.uint16)
    if x.dtype == jnp.uint16:
        return x.astype(jnp.int32) << 16
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)


def from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(x: Array) -> Array:
    return float32_bits(x) & MAGNITUDE_MASK


def widen(bits: Array) -> Array:
    """float64 of the nonnegative float32 with these bits."""
    subnormal = bits.astype(jnp.float64) * _SUBNORMAL_STEP
    return jnp.where(bits < SMALLEST_NORMAL_BITS, subnormal, from_bits(bits).astype(jnp.float64))


def round_to_float32(x: Array) -> Array:
    """A nonnegative float64 rounded to the nearest float32 value, still as float64."""
    subnormal = lax.round(x * (1 / _SUBNORMAL_STEP), lax.RoundingMethod.TO_NEAREST_EVEN) * _SUBNORMAL_STEP
    return jnp.where(x < _SMALLEST_NORMAL, subnormal, lax.reduce_precision(x, 8, 23))


def narrow_bits(x: Array) -> Array:
    """int32 bits of a nonnegative float64 that is a float32 value."""
    subnormal = jnp.where(x < _SMALLEST_NORMAL, x, 0.0) * (1 / _SUBNORMAL_STEP)
    normal = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return jnp.where(x < _SMALLEST_NORMAL, subnormal.astype(jnp.int32), normal)


def narrow(x: Array) -> Array:
    """float32 of a nonnegative float64 that is a float32 value."""
    return from_bits(narrow_bits(x))


def widen_signed(x: Array) -> Array:
    """float64 of a float32."""
    bits = float32_bits(x)
    return jnp.where(bits < 0, -1.0, 1.0) * widen(bits & MAGNITUDE_MASK)


def round_signed_to_float32(x: Array) -> Array:
    return jnp.where(x < 0, -1.0, 1.0) * round_to_float32(jnp.abs(x))


def narrow_signed(x: Array) -> Array:
    """float32 of a float64 that is a float32 value."""
    bits = narrow_bits(jnp.abs(x))
    return from_bits(jnp.where(x < 0, bits | ~MAGNITUDE_MASK, bits))


def as_float32(x: Array) -> Array:
    """A float64 array rounded to float32, signs and subnormals kept."""
    negative = lax.bitcast_convert_type(x, jnp.int64) < 0
    bits = narrow_bits(round_to_float32(jnp.abs(x)))
    return from_bits(jnp.where(negative, bits | ~MAGNITUDE_MASK, bits))


def e4m3_float32(code: Array) -> Array:
    """float32 E4M3 value of an int32 code >= 8; beyond 126 the values go on doubling every 8 codes."""
    return from_bits((code + formats.E4M3_TO_FLOAT32) << 20)


def e4m3_float32_after(code: Array, steps: int) -> Array:
    """e4m3_float32(code + steps)."""
    return from_bits((code << 20) + ((formats.E4M3_TO_FLOAT32 + steps) << 20))


def e4m3_float64(code: Array) -> Array:
    """formats.E4M3_VALUES[code] of an int32 code."""
    subnormal = code.astype(jnp.float64) * 2.0**-9
    return jnp.where(code < _SMALLEST_NORMAL_CODE, subnormal, e4m3_float32(code).astype(jnp.float64))


def e2m1_float64(code: Array) -> Array:
    """formats.E2M1_VALUES[code] of an int32 code 0 .. 7."""
    normal = from_bits((code << 22) + (126 << 23)).astype(jnp.float64)
    return jnp.where(code < 2, code.astype(jnp.float64) * 0.5, normal)


def block_amax(code: Array, global_amax: Array) -> Array:
    """float64: formats.amax_by_code(global_amax)[code] for int32 codes and float64 global_amax."""
    ratio = round_to_float32(e4m3_float64(code) * (1 / formats.E4M3_MAX))
    return round_to_float32(ratio * global_amax)


def block_scale(code: Array, global_amax: Array) -> Array:
    """float64: formats.scale_by_code(global_amax)[code]."""
    return round_to_float32(block_amax(code, global_amax) * (1 / formats.E2M1_MAX))


def checkpoint_scale(global_amax: Array) -> Array:
    """float32: global_amax / 2688, of a float32 global_amax."""
    quotient = widen(magnitude_bits(global_amax)) * (1 / formats.NVFP4_MAX)
    return narrow(round_to_float32(quotient))


def reciprocal(scale: Array) -> Array:
    """1 / scale, and 0 where scale is 0: its blocks then round to 0."""
    return jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)


def nearest_e2m1(magnitude: Array, inverse_scale: Array) -> Array:
    """The E2M1 point nearest to magnitude * inverse_scale, in the inputs' dtype.

    In float64, for float32 values and the reciprocal of a float32 value, it is a nearest point
    exactly: |w| / s is a midpoint, and either neighbour serves, or at least 2^-28 away from one.
    """
    y = magnitude * inverse_scale
    y = jnp.where(y < 6, y, 6)
    unit = 2.0 ** (51 if y.dtype == jnp.float64 else 22)
    # The rounding of theorem 4. It depends on y, so XLA cannot cancel it.
    rounder = y * y * (ROUNDER_SLOPE * unit) + ROUNDER_BASE * unit
    return rounder - (rounder - y)


def nearest_even_e2m1(magnitude: Array, inverse_scale: Array) -> Array:
    """As nearest_e2m1 in float64; where two points are equally near, the one of the even code."""
    # A y as near to a midpoint as this is one (see nearest_e2m1).
    y = lax.reduce_precision(jnp.minimum(magnitude * inverse_scale, 8), 11, 40)
    step = jnp.where(y < 2, 0.5, jnp.where(y < 4, 1.0, 2.0))
    per_step = jnp.where(y < 2, 2.0, jnp.where(y < 4, 1.0, 0.5))
    # Neighbours of an octave's end apart, the number of steps is as even as the code.
    return jnp.minimum(step * lax.round(y * per_step, lax.RoundingMethod.TO_NEAREST_EVEN), 6)


def quotient(a: Array, b: Array) -> Array:
    """a / b for b >= 0, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)


def two_sum(a: Array, b: Array) -> Pair:
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def split(a: Array) -> Pair:
    """A float64 as its leading 26 bits and the rest, without arithmetic that could be contracted."""
    high = lax.reduce_precision(a, 11, 25)
    return high, a - high


def added(pair: Pair, x: Array) -> Pair:
    high, low = two_sum(pair[0], x)
    return two_sum(high, pair[1] + low)


def less(a: Pair, b: Pair) -> Array:
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
