"""CUDA: the tables that a sweep reads, one a matrix, from its global amax.

    largest    the largest |w|: one partial maximum a program, as bits, so that NaN wins
    tabulate   the global amax and, from it, scales and window bounds by code: one TABLE a matrix

An output that is None is not written.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import formats, window

# One table a matrix, float32: (-scale, -1 / scale) by code, twice; the amax by code; the scalars; by code the
# seven thresholds of the points, and room for an eighth.
SECOND_COPY = tl.constexpr(256)
AMAX = tl.constexpr(512)
GLOBAL_AMAX = tl.constexpr(640)
LOWER = tl.constexpr(641)
UPPER = tl.constexpr(642)
SCREEN_UPPER = tl.constexpr(643)
THRESHOLDS = tl.constexpr(644)
TABLE = tl.constexpr(THRESHOLDS.value + 8 * 128)
# Floats a matrix of what `tabulate` leaves for the host to check.
CHECKED = tl.constexpr(4)

# What is found of a Hessian. Bad: not finite, not symmetric or not positive semidefinite.
ZERO_HESSIAN = tl.constexpr(1.0)
BAD_HESSIAN = tl.constexpr(2.0)

MAX_CODE = tl.constexpr(formats.MAX_CODE)
E4M3_TO_FLOAT32 = tl.constexpr(formats.E4M3_TO_FLOAT32)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
E2M1_MAX = tl.constexpr(formats.E2M1_MAX)
NVFP4_MAX = tl.constexpr(formats.NVFP4_MAX)
LEAST_GLOBAL_AMAX = tl.constexpr(window.LEAST_GLOBAL_AMAX)
LEAST_SCREENED_AMAX = tl.constexpr(window.LEAST_SCREENED_AMAX)
GREATEST_SCREENED_AMAX = tl.constexpr(window.GREATEST_FLOAT32_PEAK)


@triton.constexpr_function
def _midpoint(k):
    return float(formats.E2M1_VALUES[k] + formats.E2M1_VALUES[k + 1]) / 2


@triton.jit
def _thresholds(scale):
    """What an element must exceed to take the point 1 .. 7 of the grid, ties to the even code.

    x > m scale for a float32 x is x > t, t the largest float32 <= m scale; x >= m scale is x > t, t the
    largest below it. The products are exact in float64.
    """
    wide = scale.to(tl.float64)
    result = ()
    for k in tl.static_range(7):
        exact = wide * _midpoint(k)
        rounded = exact.to(tl.float32)
        if k % 2 == 1:  # a tie here goes up
            above = rounded.to(tl.float64) >= exact
        else:
            above = rounded.to(tl.float64) > exact
        t = (rounded.to(tl.int32, bitcast=True) - above.to(tl.int32)).to(tl.float32, bitcast=True)
        result = result + (tl.where(scale > 0.0, t, float("inf")),)
    return result


@triton.jit
def matrix_at(weight, starts, matrix, matrix_stride):
    """The first element of a matrix: the matrices are matrix_stride apart, or starts[matrix] * 16 bytes from
    `weight`."""
    if starts is None:
        return weight + matrix * matrix_stride
    else:
        return weight + tl.load(starts + matrix) * (128 // weight.dtype.element_ty.primitive_bitwidth)


@triton.jit(do_not_specialize=["matrix_stride", "outer_stride", "length_stride", "inner_stride",
                               "length", "inner", "n_elements", "matrices", "n_partials",
                               "tiles_per_program"])  # fmt: skip
def largest(weight, starts, partials, matrix_stride: tl.int64, outer_stride: tl.int64,
            length_stride: tl.int64, inner_stride: tl.int64, length: tl.int64, inner: tl.int64,
            n_elements: tl.int64, matrices: tl.int32, n_partials: tl.int32, tiles_per_program: tl.int32,
            DENSE: tl.constexpr, SIZE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """DENSE: a matrix is n_elements in a row. SIZE elements a tile. OVERLAP: with the launch of tabulate."""
    if OVERLAP:
        cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    first = part.to(tl.int64) * tiles_per_program * SIZE
    for i in range(tl.program_id(1), matrices, tl.num_programs(1)):
        matrix = tl.full([], 0, tl.int64) + i
        elements = matrix_at(weight, starts, matrix, matrix_stride)
        result = tl.zeros([SIZE], tl.int32)
        for tile in range(tiles_per_program):
            element = first + tile * SIZE + tl.arange(0, SIZE)
            offset = element
            if not DENSE:
                row = element // inner
                offset = (
                    (row // length) * outer_stride
                    + (row % length) * length_stride
                    + (element % inner) * inner_stride
                )
            w = tl.load(elements + offset, mask=element < n_elements, other=0.0).to(tl.float32)
            result = tl.maximum(result, tl.abs(w).to(tl.int32, bitcast=True))
        bits = tl.max(result, axis=0)
        tl.store(partials + matrix * n_partials + part, bits.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["n_partials", "n_hessians", "hessian_stride"])
def tabulate(partials, given_amax, hessian_status, tables, global_amax, global_scale, checked,
             n_partials: tl.int32, n_hessians: tl.int32, hessian_stride: tl.int32, lower, upper,
             SIZE: tl.constexpr, OVERLAP: tl.constexpr):  # fmt: skip
    """`partials` are n_partials floats a matrix, the largest |w| among them; so many at a time, none where
    SIZE is 0. `checked` gets of each matrix the largest |w|, the amax, and how many of its n_hessians are
    zero and bad. OVERLAP: with what the sweep does before it needs the tables, and with the end of
    `largest`."""
    if OVERLAP:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    matrix = tl.program_id(0).to(tl.int64)
    found = 0.0
    if SIZE > 0:
        bits = tl.zeros([SIZE], tl.int32)
        for start in range(0, n_partials, SIZE):
            lanes = start + tl.arange(0, SIZE)
            partial = tl.load(partials + matrix * n_partials + lanes, mask=lanes < n_partials, other=0.0)
            bits = tl.maximum(bits, tl.abs(partial.to(tl.float32)).to(tl.int32, bitcast=True))
        found = tl.max(bits, axis=0).to(tl.float32, bitcast=True)
    amax = found
    if given_amax is not None:
        amax = tl.load(given_amax + matrix)
    # float64 and one rounding: a float32 product or quotient here could flush subnormals.
    wide_amax = amax.to(tl.float64)
    if checked is not None:
        tl.store(checked + CHECKED * matrix, found)
        tl.store(checked + CHECKED * matrix + 1, amax)
        if hessian_status is not None:
            zeros = tl.zeros([SIZE], tl.int32)
            bad = zeros
            for start in range(0, n_hessians, SIZE):
                lanes = start + tl.arange(0, SIZE)
                status = tl.load(hessian_status + matrix * hessian_stride + lanes, mask=lanes < n_hessians,
                                 other=0.0)  # fmt: skip
                zeros += (status == ZERO_HESSIAN).to(tl.int32)
                bad += (status == BAD_HESSIAN).to(tl.int32)
            tl.store(checked + CHECKED * matrix + 2, tl.sum(zeros, axis=0).to(tl.float32))
            tl.store(checked + CHECKED * matrix + 3, tl.sum(bad, axis=0).to(tl.float32))
    if global_amax is not None:
        tl.store(global_amax + matrix, amax)
    if global_scale is not None:
        tl.store(global_scale + matrix, (wide_amax / NVFP4_MAX).to(tl.float32))
    if tables is not None:
        _fill(tables + matrix * TABLE, amax, lower, upper)


@triton.jit
def _fill(table, amax, lower, upper):
    wide_amax = amax.to(tl.float64)
    column = tl.arange(0, 128)
    code = tl.minimum(column, MAX_CODE)
    value = tl.where(code < 8, code * 2.0**-9, ((code + E4M3_TO_FLOAT32) << 20).to(tl.float32, bitcast=True))
    ratio = (value.to(tl.float64) / E4M3_MAX).to(tl.float32)
    block_amax = (ratio.to(tl.float64) * wide_amax).to(tl.float32)
    scale = (block_amax.to(tl.float64) / E2M1_MAX).to(tl.float32)
    divisor = tl.where(amax >= LEAST_GLOBAL_AMAX, tl.maximum(scale, 2.0**-125), 1.0).to(tl.float64)
    for copy in tl.static_range(2):
        tl.store(table + copy * SECOND_COPY + 2 * column, 0.0 - scale)
        tl.store(table + copy * SECOND_COPY + 2 * column + 1, (-1.0 / divisor).to(tl.float32))
    thresholds = _thresholds(scale)
    for k in tl.static_range(7):
        tl.store(table + THRESHOLDS + 8 * column + k, thresholds[k])
    tl.store(table + AMAX + column, block_amax)
    tl.store(table + GLOBAL_AMAX, amax)
    unit = tl.maximum(amax, LEAST_GLOBAL_AMAX).to(tl.float64) / NVFP4_MAX
    tl.store(table + LOWER, (lower / unit).to(tl.float32))
    tl.store(table + UPPER, (upper / unit).to(tl.float32))
    # 0 makes every block undecided.
    screens = (amax >= LEAST_SCREENED_AMAX) & (amax <= GREATEST_SCREENED_AMAX)
    tl.store(table + SCREEN_UPPER, tl.where(screens, (upper / unit).to(tl.float32), 0.0))
