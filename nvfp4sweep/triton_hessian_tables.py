"""CUDA: what a sweep reads of each 16x16 Hessian, prepared once by `prepare`: one HESSIAN_TABLE each."""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_tables import BAD_HESSIAN, ZERO_HESSIAN

# In floats. The Hessian (symmetric, the identity where it is zero) scaled by a power of two to a largest
# element in [1, 2): in float64 row by row; then in float32 its upper triangle, row by row, with twice what is
# off the diagonal; c and mu of theorem 10; sum c and nu of theorem 12; what the Hessian was divided by.
PAIRS = tl.constexpr(512)
ROW_SUMS = tl.constexpr(PAIRS.value + 144)
FRACTION = tl.constexpr(ROW_SUMS.value + 16)
SUM = tl.constexpr(FRACTION.value + 1)
EXCESS = tl.constexpr(FRACTION.value + 2)
UNSCALE = tl.constexpr(FRACTION.value + 4)  # a float64
HESSIAN_TABLE = tl.constexpr(FRACTION.value + 8)

# Of the square of a block's largest element: what products and elements of a scaled Hessian that are flushed
# may come to.
FLUSHED = tl.constexpr(2.0**-110)

TOLERANCE = tl.constexpr(proofs.HESSIAN_TOLERANCE)
# Where all pivots of a matrix with elements up to 1 are larger it is positive definite, within less.
LEAST_PIVOT = tl.constexpr(1e-13)
DEFINITE_WITHIN = tl.constexpr(1e-12)
# nu, where there is no mu: a Hessian of few tokens is singular but for rounding. Infinite where that fails.
NEGLIGIBLE = tl.constexpr(2.0**-16)
# mu is sought among 2^(-k / 4) for k below this.
FRACTIONS = tl.constexpr(64)


@triton.constexpr_function
def pair_index(i, j):
    """Of elements i and j >= i among PAIRS."""
    return i * 16 - i * (i - 1) // 2 + j - i


@triton.jit
def _is_definite(a, row, column):
    """Whether all pivots of a symmetric float64 [16, 16] are positive."""
    definite = tl.full([], 1, tl.int32)
    for k in range(16):
        # Its column too, since all that is done to it keeps it symmetric.
        of_row = tl.sum(tl.where(row == k, a, 0.0), axis=0)
        pivot = tl.sum(tl.where(tl.arange(0, 16) == k, of_row, 0.0), axis=0)
        definite = tl.where(pivot > LEAST_PIVOT, definite, 0)
        reciprocal = 1.0 / tl.where(pivot > LEAST_PIVOT, pivot, 1.0)
        a = a - (of_row[:, None] * of_row[None, :]) * reciprocal
    return definite


@triton.jit
def _fraction(scaled, sums, row, column):
    """(the largest mu of those tried such that H - mu diag(c) is positive semidefinite, or 0; nu)."""
    free = sums == 0.0
    root = tl.sqrt(tl.where(free, 1.0, sums).to(tl.float64))
    unit = scaled / (root[:, None] * tl.sqrt(tl.where(free, 1.0, sums).to(tl.float64))[None, :])
    diagonal = row == column
    unit = tl.where(diagonal & free[:, None], 1.0, unit)
    low = tl.full([], 0, tl.int32)
    high = low + FRACTIONS
    for _ in range(7):
        k = (low + high) // 2
        mu = tl.exp2(k.to(tl.float32) * -0.25).to(tl.float64)
        definite = _is_definite(unit - tl.where(diagonal, mu, 0.0), row, column) != 0
        searching = low < high
        high = tl.where(searching & definite, k, high)
        low = tl.where(searching & ~definite, k + 1, low)
    mu = tl.exp2(low.to(tl.float32) * -0.25).to(tl.float64) * (1.0 - DEFINITE_WITHIN)
    fraction = tl.where(low < FRACTIONS, mu.to(tl.float32) * (1.0 - 2.0**-20), 0.0)
    excess = 0.0 * fraction
    if fraction == 0.0:
        nearly = _is_definite(unit + tl.where(diagonal, 0.5 * NEGLIGIBLE, 0.0), row, column) != 0
        excess = tl.where(nearly, NEGLIGIBLE, float("inf"))
    return fraction, excess


@triton.jit
def prepare(hessian, hessian_tables, hessian_status, OVERLAP: tl.constexpr):
    """A program a Hessian. OVERLAP: with the launch of what follows."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 16)[:, None] + tl.zeros([1, 16], tl.int32)
    column = tl.arange(0, 16)[None, :] + tl.zeros([16, 1], tl.int32)
    given = tl.load(hessian + index * 256 + row * 16 + column)
    mirrored = tl.load(hessian + index * 256 + column * 16 + row)
    size = tl.abs(given.to(tl.float64))
    finite = tl.min(tl.min((size < float("inf")).to(tl.int32), axis=1), axis=0)
    most = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), axis=1), axis=0)
    uneven = tl.abs(given.to(tl.float64) - mirrored.to(tl.float64)) > most * TOLERANCE
    symmetric = 1 - tl.max(tl.max(uneven.to(tl.int32), axis=1), axis=0)
    mean = ((given.to(tl.float64) + mirrored.to(tl.float64)) / 2.0).to(tl.float32)
    zero = tl.max(tl.max((mean != 0.0).to(tl.int32), axis=1), axis=0) == 0
    mean = tl.where(zero, tl.where(row == column, 1.0, 0.0), mean)

    largest = tl.max(tl.max(tl.abs(mean.to(tl.float64)), axis=1), axis=0)
    exponent = largest.to(tl.int64, bitcast=True) >> 52  # biased, of a normal float64
    power = (exponent << 52).to(tl.float64, bitcast=True)
    scaled = mean.to(tl.float64) / power
    in_float32 = scaled.to(tl.float32)
    exact_sums = tl.sum(tl.abs(scaled), axis=1)
    sums = (exact_sums * (1.0 + 2.0**-22)).to(tl.float32)
    fraction, excess = _fraction(scaled, sums, row, column)
    definite = fraction > 0.0
    if fraction == 0.0:
        shifted = scaled / 2.0 + tl.where(row == column, TOLERANCE, 0.0)
        definite = _is_definite(shifted, row, column) != 0

    table = hessian_tables + index * HESSIAN_TABLE
    in_float64 = table.to(tl.pointer_type(tl.float64), bitcast=True)
    tl.store(in_float64 + row * 16 + column, scaled)
    pair = row * 16 - row * (row - 1) // 2 + column - row
    tl.store(table + PAIRS + pair, tl.where(row == column, in_float32, 2.0 * in_float32), mask=column >= row)
    tl.store(table + ROW_SUMS + tl.arange(0, 16), sums)
    tl.store(table + FRACTION, fraction)
    tl.store(table + SUM, tl.sum(sums, axis=0) * (1.0 + 2.0**-20))
    tl.store(table + EXCESS, excess)
    tl.store(in_float64 + UNSCALE // 2, power)
    if hessian_status is not None:
        good = (finite == 1) & (symmetric == 1) & definite
        status = tl.where(good, tl.where(zero, ZERO_HESSIAN, 0.0), BAD_HESSIAN)
        tl.store(hessian_status + index, status)
