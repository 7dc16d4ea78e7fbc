"""What no margin settles, exactly: float64 without rounding errors, and sums as integers of many digits."""

import math

import numpy as np

from nvfp4sweep import formats
from nvfp4sweep.lanes import jit
from nvfp4sweep.window import HESSIAN_MARGIN_FLOAT64

SIZE = formats.BLOCK_SIZE  # with a Hessian
GRID = formats.E2M1_VALUES
MIDPOINTS = formats.E2M1_MIDPOINTS

_VELTKAMP = 2.0**27 + 1

# Products h a b of a float32 h and residuals a, b are multiples of 2^-149 (2^-150)^2. Residuals are
# below 2^129, so sums of 2^20 such products stay below 2^407. 53 bits of a float64 may reach below the
# least multiple, and the last digit takes the sign.
_LEAST_EXPONENT = -16 * 32
DIGITS = 30
_DIGIT = np.int64(0xFFFFFFFF)


@jit(inline="always")
def two_sum(a, b):
    """a + b as a float64 and what its rounding left."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@jit(inline="always")
def two_product(a, b):
    """a * b as a float64 and what its rounding left."""
    product = a * b
    t = _VELTKAMP * a
    a_high = t - (t - a)
    a_low = a - a_high
    t = _VELTKAMP * b
    b_high = t - (t - b)
    b_low = b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@jit()
def exact_residual(w, scale):
    """w >= 0 less its nearest point at a float32 scale, the even code in a tie: a float64 and its rest.

    The rest is 0 unless w > 2^26 scale.
    """
    q = 0.0
    for step in range(7):
        edge = MIDPOINTS[step] * scale  # exact
        if w > edge or (step & 1 and w == edge):
            q = GRID[step + 1]
    return two_sum(w, -q * scale)


@jit()
def add_product(digits, h, a, b, sign):
    """digits += sign h a b, for a float32 h and residuals a and b."""
    if h == 0 or a == 0 or b == 0:
        return
    for part in two_product(a, b):
        for summand in two_product(part, h):
            _add(digits, summand * sign)


@jit()
def _add(digits, value):
    if value == 0 or not abs(value) < np.inf:
        return
    fraction, exponent = math.frexp(abs(value))
    integer = np.int64(fraction * 2.0**53)
    position = exponent - 53 - _LEAST_EXPONENT
    index, shift = position >> 5, position & 31
    low, high = (integer & _DIGIT) << shift, (integer >> 32) << shift
    sign = np.int64(1) if value > 0 else np.int64(-1)
    digits[index] += sign * (low & _DIGIT)
    digits[index + 1] += sign * ((low >> 32) + (high & _DIGIT))
    digits[index + 2] += sign * (high >> 32)


@jit()
def sign_of(digits):
    """-1, 0 or 1; the digits are set to zero."""
    carry, any_digit = np.int64(0), np.int64(0)
    for i in range(DIGITS):
        total = digits[i] + carry
        carry = total >> 32
        any_digit |= total & _DIGIT
        digits[i] = 0
    if carry < 0:
        return -1
    return 1 if any_digit else 0


# --- squared errors with importances --------------------------------------------------------------


@jit()
def weighted_error(tile, importances, lane, block_size, scale):
    """The weighted squared error, summed in float64 element by element, as the oracle does."""
    total = 0.0
    for i in range(block_size):
        w = np.float64(tile[i, lane])
        least = w * w
        for step in range(1, 8):
            residual = w - GRID[step] * scale
            least = min(least, residual * residual)
        total += np.float64(importances[i, lane]) * least
    return total


@jit()
def _clipping(tile, importances, lane, block_size, scale):
    """What clipping costs at a scale, and at any below (theorem 6)."""
    total = 0.0
    for i in range(block_size):
        excess = max(0.0, np.float64(tile[i, lane]) - 6 * scale)
        total += np.float64(importances[i, lane]) * (excess * excess)
    return total


@jit()
def _is_less_square(tile, importances, lane, block_size, scale, other, digits):
    """Whether the error at a scale is less than at another, exactly."""
    for i in range(block_size):
        h, w = np.float64(importances[i, lane]), np.float64(tile[i, lane])
        a, a_rest = exact_residual(w, scale)
        b, b_rest = exact_residual(w, other)
        if h == 0 or (abs(a) == abs(b) and a_rest == 0 and b_rest == 0):
            continue
        add_product(digits, h, a, a, 1.0)
        add_product(digits, h, 2 * a, a_rest, 1.0)
        add_product(digits, h, a_rest, a_rest, 1.0)
        add_product(digits, h, b, b, -1.0)
        add_product(digits, h, 2 * b, b_rest, -1.0)
        add_product(digits, h, b_rest, b_rest, -1.0)
    return sign_of(digits) < 0


@jit()
def settle_squares(
    tile, importances, lane, block_size, scales, first, last, all_codes, errors, limit, exact, digits
):
    """The lowest code of first .. last of least error: of all, or of those with errors[last - code] <= limit.

    A float64 error is off by (n + 3) 2^-53 of itself at most: residual, square and product are rounded,
    n - 1 sums are.
    """
    relative_margin = 4 * (block_size + 4) * 2.0**-53
    least = np.inf
    lowest = last
    for code in range(last, first - 1, -1):
        exact[code] = np.inf
        if not all_codes and errors[last - code, lane] > limit:
            continue
        scale = np.float64(scales[code])
        if all_codes and least < _clipping(tile, importances, lane, block_size, scale) * (
            1 - relative_margin
        ):
            break
        exact[code] = weighted_error(tile, importances, lane, block_size, scale)
        least = min(least, exact[code])
        lowest = code
    bound = least * (1 + relative_margin)
    best = np.int32(-1)
    for code in range(lowest, last + 1):
        if exact[code] <= bound and (
            best < 0
            or _is_less_square(
                tile,
                importances,
                lane,
                block_size,
                np.float64(scales[code]),
                np.float64(scales[best]),
                digits,
            )
        ):
            best = np.int32(code)
    return best if best > 0 else np.int32(first)  # NaN, where nobody checked


# --- quadratic forms ------------------------------------------------------------------------------


@jit()
def signed_residuals(magnitudes, signs, lane, scale, residual, rest):
    """Of the nearest points, in float64: residual + rest, exactly."""
    for i in range(SIZE):
        r, r_rest = exact_residual(np.float64(magnitudes[i, lane]), scale)
        negative = signs[i, lane] != 0
        residual[i] = 0.0 - r if negative else r
        rest[i] = 0.0 - r_rest if negative else r_rest


@jit()
def form_in_order(hessian, residual, rows):
    """r^T H r in float64: sums over j, then over i, in order, of products rounded one by one."""
    for i in range(SIZE):
        rows[i] = np.float64(hessian[0, i]) * residual[0]
    for j in range(1, SIZE):
        for i in range(SIZE):
            rows[i] += np.float64(hessian[j, i]) * residual[j]
    total = rows[0] * residual[0]
    for i in range(1, SIZE):
        total += rows[i] * residual[i]
    return total


@jit()
def _is_less_form(magnitudes, signs, lane, hessian, scale, other, wide, digits):
    """Whether the error at a scale is less than at another, exactly."""
    a, a_rest, b, b_rest = wide[0], wide[1], wide[2], wide[3]
    signed_residuals(magnitudes, signs, lane, scale, a, a_rest)
    signed_residuals(magnitudes, signs, lane, other, b, b_rest)
    same, opposite = True, True
    for i in range(SIZE):
        same &= a[i] == b[i] and a_rest[i] == b_rest[i]
        opposite &= a[i] == -b[i] and a_rest[i] == -b_rest[i]
    if same or opposite:
        return False
    for i in range(SIZE):
        for j in range(i + 1):
            h = np.float64(hessian[i, j]) * (1 if i == j else 2)
            add_product(digits, h, a[i], a[j], 1.0)
            add_product(digits, h, a[i], a_rest[j], 1.0)
            add_product(digits, h, a_rest[i], a[j], 1.0)
            add_product(digits, h, a_rest[i], a_rest[j], 1.0)
            add_product(digits, h, b[i], b[j], -1.0)
            add_product(digits, h, b[i], b_rest[j], -1.0)
            add_product(digits, h, b_rest[i], b[j], -1.0)
            add_product(digits, h, b_rest[i], b_rest[j], -1.0)
    return sign_of(digits) < 0


@jit()
def settle_forms(magnitudes, signs, lane, hessian, exact_sums, scales, first, last, wanted, wide, digits):
    """The lowest code of first .. last of least error, of those that are wanted."""
    least = np.inf
    low, residual, rest, rows = wide[4:12].reshape(-1), wide[0], wide[1], wide[2]
    for code in range(first, last + 1):
        low[code] = np.inf
        if wanted[code] == 0:
            continue
        signed_residuals(magnitudes, signs, lane, np.float64(scales[code]), residual, rest)
        error, size = form_in_order(hessian, residual, rows), 0.0
        for i in range(SIZE):
            size += exact_sums[i] * (residual[i] * residual[i])
        low[code] = error - HESSIAN_MARGIN_FLOAT64 * size
        least = min(least, error + HESSIAN_MARGIN_FLOAT64 * size)
    best = -1
    for code in range(first, last + 1):
        if low[code] <= least and (
            best < 0
            or _is_less_form(
                magnitudes,
                signs,
                lane,
                hessian,
                np.float64(scales[code]),
                np.float64(scales[best]),
                wide,
                digits,
            )
        ):
            best = code
    return np.int32(best if best > 0 else first)  # NaN, where nobody checked
