"""The CUDA kernels. A program handles one tile of blocks of one matrix (_program says which).

    largest    the largest |w|: one partial maximum a program, as bits, so that NaN wins
    tabulate   the global amax and, from it, scales and window factors by code: one TABLE a matrix
    screen     the best code of each block in float32; 0 where the proven margin cannot tell
    settle     those blocks exactly in float64 pairs; then every code becomes its amax
    residual   the squared error of each block at its code
    pack       the E2M1 codes, two a byte

A block's elements lie `step` apart, starting where _block_offset says. The theorems are in window.py.
"""

import triton
import triton.language as tl
from triton import knobs

from nvfp4sweep import formats, window

# The interpreter rounds the product of tl.fma; the margin of theorem 4 needs one rounding.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

# One table a matrix, float32, in columns of 128 (by code) and then the scalars.
NEGATIVE_SCALE = tl.constexpr(0)
NEGATIVE_INVERSE = tl.constexpr(128)
AMAX = tl.constexpr(256)
GLOBAL_AMAX = tl.constexpr(384)
LOWER = tl.constexpr(385)
UPPER = tl.constexpr(386)
LARGEST = tl.constexpr(387)
TABLE = tl.constexpr(512)

MAX_CODE = tl.constexpr(formats.MAX_CODE)
E4M3_TO_FLOAT32 = tl.constexpr(formats.E4M3_TO_FLOAT32)
E4M3_MAX = tl.constexpr(formats.E4M3_MAX)
E2M1_MAX = tl.constexpr(formats.E2M1_MAX)
NVFP4_MAX = tl.constexpr(formats.NVFP4_MAX)
FIRST_UNDOUBLED_CODE = tl.constexpr(window.FIRST_UNDOUBLED_CODE)
LEAST_GLOBAL_AMAX = tl.constexpr(window.LEAST_GLOBAL_AMAX)
# Where theorem 4 holds. A block that clips at most CLIPPING_CODES of its codes has s >= M / 12.
LEAST_PEAK = tl.constexpr(window.LEAST_FLOAT32_PEAK)
GREATEST_PEAK = tl.constexpr(window.GREATEST_FLOAT32_PEAK)

ROUNDER_BASE = tl.constexpr(2**22 * window.ROUNDER_BASE)
ROUNDER_SLOPE = tl.constexpr(2**22 * window.ROUNDER_SLOPE)
# So many of a window's lowest scales may clip: E4M3 has no more codes between M / 8 and M / 6.
CLIPPING_CODES = tl.constexpr(5)
VELTKAMP = tl.constexpr(2.0**27 + 1)


@triton.jit
def _fma(a, b, c):
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def _program(tiles):
    """(matrix, tile) of this program: a grid of one dimension holds any number of matrices."""
    program = tl.program_id(0)
    return (program // tiles).to(tl.int64), (program % tiles).to(tl.int64)


@triton.jit
def _block_offset(block, length_blocks, inner, stride_outer, stride_block, stride_inner):
    """Where block [outer, length_blocks, inner] of a matrix begins."""
    row = block // inner
    return (
        (row // length_blocks) * stride_outer
        + (row % length_blocks) * stride_block
        + (block % inner) * stride_inner
    )


@triton.jit
def largest(weight, stride_matrix, stride_outer, stride_length, stride_inner, length, inner, n_elements,
            partials, n_partials, tiles_per_program, FLAT: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    matrix, part = _program(n_partials)
    weight += matrix * stride_matrix
    result = tl.zeros([SIZE], tl.int32)
    first = part * tiles_per_program * SIZE
    for tile in range(tiles_per_program):
        element = first + tile * SIZE + tl.arange(0, SIZE)
        offset = element
        if not FLAT:
            row = element // inner
            offset = (
                (row // length) * stride_outer
                + (row % length) * stride_length
                + (element % inner) * stride_inner
            )
        w = tl.load(weight + offset, mask=element < n_elements, other=0.0).to(tl.float32)
        result = tl.maximum(result, tl.abs(w).to(tl.int32, bitcast=True))
    bits = tl.max(result, axis=0)
    tl.store(partials + matrix * n_partials + part, bits.to(tl.float32, bitcast=True))


@triton.jit
def tabulate(partials, n_partials, given_amax, tables, lower, upper,
             HAS_PARTIALS: tl.constexpr, HAS_AMAX: tl.constexpr, PARTIALS: tl.constexpr):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    tables += matrix * TABLE
    if HAS_PARTIALS:
        lanes = tl.arange(0, PARTIALS)
        partial = tl.load(partials + matrix * n_partials + lanes, mask=lanes < n_partials, other=0.0)
        found = tl.max(partial.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    else:
        found = 0.0
    if HAS_AMAX:
        amax = tl.load(given_amax + matrix)
    else:
        amax = found
    # float64 and one rounding: a float32 product or quotient here could flush subnormals.
    column = tl.arange(0, 128)
    code = tl.minimum(column, MAX_CODE)
    value = tl.where(code < 8, code * 2.0**-9, ((code + E4M3_TO_FLOAT32) << 20).to(tl.float32, bitcast=True))
    ratio = (value.to(tl.float64) / E4M3_MAX).to(tl.float32)
    block_amax = (ratio.to(tl.float64) * amax.to(tl.float64)).to(tl.float32)
    scale = (block_amax.to(tl.float64) / E2M1_MAX).to(tl.float32)
    tl.store(tables + NEGATIVE_SCALE + column, 0.0 - scale)
    divisor = tl.where(amax >= LEAST_GLOBAL_AMAX, tl.maximum(scale, 2.0**-125), 1.0).to(tl.float64)
    tl.store(tables + NEGATIVE_INVERSE + column, (-1.0 / divisor).to(tl.float32))
    tl.store(tables + AMAX + column, block_amax)
    tl.store(tables + GLOBAL_AMAX, amax)
    unit = tl.maximum(amax, LEAST_GLOBAL_AMAX).to(tl.float64) / NVFP4_MAX
    tl.store(tables + LOWER, (lower / unit).to(tl.float32))
    tl.store(tables + UPPER, (upper / unit).to(tl.float32))
    tl.store(tables + LARGEST, found)


@triton.jit
def _code_at_least(value):
    """The lowest E4M3 code whose value is >= value; beyond 126 where there is none."""
    uniform = tl.ceil(tl.minimum(value, 1.0) * 512.0).to(tl.int32)
    normal = ((value.to(tl.int32, bitcast=True) + 0xFFFFF) >> 20) - E4M3_TO_FLOAT32
    return tl.where(value < 2.0**-6, uniform, normal)


@triton.jit
def _window(peak, tables, min_code, last_unhalved):
    """The first and last code that can win (theorems 1 to 3); all codes where premise 0 fails."""
    first = tl.minimum(_code_at_least(peak * tl.load(tables + LOWER)), FIRST_UNDOUBLED_CODE)
    last = tl.maximum(_code_at_least(peak * tl.load(tables + UPPER)) - 1, last_unhalved)
    first = tl.maximum(first, min_code)
    last = tl.minimum(last, MAX_CODE)
    amax = tl.load(tables + GLOBAL_AMAX)
    doubles = amax >= LEAST_GLOBAL_AMAX
    first = tl.where(doubles, first, min_code)
    last = tl.where(doubles, last, MAX_CODE)
    least_scale = 0.0 - tl.load(tables + NEGATIVE_SCALE + min_code)
    trivial = peak * 4.0 <= tl.where(amax == 0.0, float("inf"), least_scale)
    return tl.where(trivial, min_code, first), tl.where(trivial, min_code, last)


@triton.jit
def _split(x, T: tl.constexpr, N: tl.constexpr):
    """The N columns of [T, N] as N vectors [T]."""
    if N == 1:
        return (tl.reshape(x, [T]),)
    else:
        even, odd = tl.split(tl.reshape(x, [T, N // 2, 2]))
        return _interleave(_split(even, T, N // 2), _split(odd, T, N // 2))


@triton.jit
def _interleave(a, b):
    result = ()
    for i in tl.static_range(len(a)):
        result = result + (a[i], b[i])
    return result


@triton.jit
def screen(weight, stride_matrix, stride_outer, stride_block, stride_length, stride_inner, length_blocks,
           inner, n_blocks, tiles, tables, codes, min_code, last_unhalved, relative_margin, absolute_margin,
           ROWS: tl.constexpr, FLAT: tl.constexpr, VECTOR: tl.constexpr, BLOCK_SIZE: tl.constexpr,
           CANDIDATES: tl.constexpr, T: tl.constexpr):  # fmt: skip
    matrix, tile = _program(tiles)
    tables += matrix * TABLE
    start = tile * T
    lane = tl.arange(0, T)
    inside = start + lane < n_blocks
    weight += matrix * stride_matrix
    if FLAT:
        weight += start * BLOCK_SIZE
        offset = lane * BLOCK_SIZE
    else:
        offset = _block_offset(start + lane, length_blocks, inner, stride_outer, stride_block, stride_inner)

    # One vector [T] an element: a block lies within a thread, and its error is one chain of fma.
    w = ()
    if ROWS:
        for i in tl.static_range(BLOCK_SIZE // VECTOR):
            pointer = weight + offset[:, None] + (i * VECTOR + tl.arange(0, VECTOR))[None, :]
            w = w + _split(tl.load(pointer, mask=inside[:, None], other=0.0), T, VECTOR)
    else:
        for i in tl.static_range(BLOCK_SIZE):
            w = w + (tl.load(weight + offset + i * stride_length, mask=inside, other=0.0),)
    magnitude = ()
    square = ()
    peak = tl.zeros([T], tl.float32)
    for i in tl.static_range(BLOCK_SIZE):
        m = tl.abs(w[i].to(tl.float32))
        magnitude = magnitude + (m,)
        square = square + (m * m,)
        peak = tl.maximum(peak, m)

    first, last = _window(peak, tables, min_code, last_unhalved)
    least = tl.full([T], float("inf"), tl.float32)
    second = least
    best = first
    clipped = peak > GREATEST_PEAK
    for j in tl.static_range(CANDIDATES):
        code = tl.minimum(first + j, MAX_CODE)
        negative_scale = tl.load(tables + NEGATIVE_SCALE + code)
        negative_inverse = tl.load(tables + NEGATIVE_INVERSE + code)
        slope = negative_inverse * negative_inverse * ROUNDER_SLOPE
        if j == CLIPPING_CODES:
            clipped = clipped | (peak > -6.0 * negative_scale)
        error = tl.zeros([T], tl.float32)
        for i in tl.static_range(BLOCK_SIZE):
            rounder = _fma(square[i], slope, tl.full([T], ROUNDER_BASE, tl.float32))
            q = rounder - _fma(magnitude[i], negative_inverse, rounder)
            if j < CLIPPING_CODES:
                q = tl.minimum(q, 6.0)
            residual = _fma(q, negative_scale, magnitude[i])
            error = _fma(residual, residual, error)
        error = tl.where(first + j <= last, error, float("inf"))
        second = tl.minimum(second, tl.maximum(least, error))
        best = tl.where(error < least, code, best)
        least = tl.minimum(least, error)

    single = first == last
    apart = second > least * (1.0 + relative_margin) + absolute_margin
    fits = (last - first < CANDIDATES) & (peak >= LEAST_PEAK) & (clipped == 0)
    best = tl.where(single | (apart & fits), best, 0)
    tl.store(codes + matrix * n_blocks + start + lane, best.to(tl.float32), mask=inside)


@triton.jit
def _two_sum(a, b):
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


@triton.jit
def _two_product(a, b):
    product = a * b
    t = VELTKAMP * a
    a_high = t - (t - a)
    a_low = a - a_high
    t = VELTKAMP * b
    b_high = t - (t - b)
    b_low = b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@triton.jit
def _nearest_point(magnitude, scale):
    """The E2M1 magnitude nearest to magnitude / scale, in float64: midpoints times scales are exact."""
    q = tl.where(magnitude > 0.25 * scale, 0.5, 0.0)
    q = tl.where(magnitude > 0.75 * scale, 1.0, q)
    q = tl.where(magnitude > 1.25 * scale, 1.5, q)
    q = tl.where(magnitude > 1.75 * scale, 2.0, q)
    q = tl.where(magnitude > 2.5 * scale, 3.0, q)
    q = tl.where(magnitude > 3.5 * scale, 4.0, q)
    return tl.where(magnitude > 5.0 * scale, 6.0, q).to(tl.float64)


@triton.jit
def _exact_best(pointer, step, block_size, tables, first, last):
    """The lowest of the codes first .. last with the least s^2 B - 2 s A (theorem 5)."""
    best = first
    best_high = tl.full([], float("inf"), tl.float64)
    best_low = best_high
    start = pointer
    for base in range(first, last + 1, 32):
        pointer = start
        code = base + tl.arange(0, 32)
        scale = (0.0 - tl.load(tables + NEGATIVE_SCALE + tl.minimum(code, MAX_CODE))).to(tl.float64)
        a = tl.zeros([32], tl.float64)
        b = tl.zeros([32], tl.float64)
        for top in range(0, block_size, 16):
            for i in tl.static_range(16):
                w = tl.load(pointer + i * step, mask=top + i < block_size, other=0.0)
                magnitude = tl.abs(w.to(tl.float64))
                q = _nearest_point(magnitude, scale)
                a += magnitude * q
                b += q * q
            pointer += 16 * step
        f_high, f_low = _two_product(scale * scale, b)
        g_high, g_low = _two_product(-2.0 * scale, a)
        high, carry = _two_sum(f_high, g_high)
        high, low = _two_sum(high, (f_low + g_low) + carry)
        high = tl.where(code <= last, high, float("inf"))
        least_high = tl.min(high, axis=0)
        low = tl.where(high == least_high, low, float("inf"))
        least_low = tl.min(low, axis=0)
        winner = tl.min(tl.where((high == least_high) & (low == least_low), code, 128), axis=0)
        better = (least_high < best_high) | ((least_high == best_high) & (least_low < best_low))
        best = tl.where(better, winner, best)
        best_high = tl.where(better, least_high, best_high)
        best_low = tl.where(better, least_low, best_low)
    return best


@triton.jit
def settle(weight, stride_matrix, stride_outer, stride_block, stride_length, stride_inner, length_blocks,
           inner, n_blocks, tiles, block_size, tables, amax, code_out, min_code, last_unhalved,
           SCREENED: tl.constexpr, HAS_CODE: tl.constexpr, T: tl.constexpr):  # fmt: skip
    matrix, tile = _program(tiles)
    tables += matrix * TABLE
    weight += matrix * stride_matrix
    start = tile * T
    lane = tl.arange(0, T)
    inside = start + lane < n_blocks
    out = matrix * n_blocks + start + lane
    if SCREENED:
        code = tl.load(amax + out, mask=inside, other=1.0).to(tl.int32)
    else:
        code = tl.where(inside, 0, 1)
    contested = code == 0
    n_contested = tl.sum(contested.to(tl.int32), axis=0)
    current = -1
    for _ in range(n_contested):
        current = tl.min(tl.where(contested & (lane > current), lane, T), axis=0)
        pointer = weight + _block_offset(
            start + current, length_blocks, inner, stride_outer, stride_block, stride_inner
        )
        peak = 0.0
        for top in range(0, block_size, 16):
            element = top + tl.arange(0, 16)
            w = tl.load(pointer + element.to(tl.int64) * stride_length, mask=element < block_size, other=0.0)
            peak = tl.maximum(peak, tl.max(tl.abs(w.to(tl.float32)), axis=0))
        first, last = _window(peak, tables, min_code, last_unhalved)
        best = _exact_best(pointer, stride_length, block_size, tables, first, last)
        code = tl.where(lane == current, best, code)
    tl.store(amax + out, tl.load(tables + AMAX + code), mask=inside)
    if HAS_CODE:
        tl.store(code_out + out, code.to(tl.uint8), mask=inside)


@triton.jit
def residual(weight, stride_matrix, stride_outer, stride_block, stride_length, stride_inner,
             length_blocks, inner, n_blocks, tiles, block_size, tables, codes, errors,
             T: tl.constexpr):  # fmt: skip
    """Summed in float64 element by element, as the oracle does."""
    matrix, tile = _program(tiles)
    tables += matrix * TABLE
    weight += matrix * stride_matrix
    block = tile * T + tl.arange(0, T)
    inside = block < n_blocks
    offset = _block_offset(block, length_blocks, inner, stride_outer, stride_block, stride_inner)
    code = tl.load(codes + matrix * n_blocks + block, mask=inside, other=1).to(tl.int32)
    scale = (0.0 - tl.load(tables + NEGATIVE_SCALE + code)).to(tl.float64)
    error = tl.zeros([T], tl.float64)
    for i in range(block_size):
        w = tl.load(weight + offset, mask=inside, other=0.0)
        magnitude = tl.abs(w.to(tl.float64))
        r = magnitude - _nearest_point(magnitude, scale) * scale
        error += r * r
        offset += stride_length
    tl.store(errors + matrix * n_blocks + block, error.to(tl.float32), mask=inside)


@triton.jit
def _nibble(w, scale):
    """The E2M1 code: nearest point, ties to even, the sign bit kept on zeros; 0 at scale 0."""
    magnitude = tl.abs(w.to(tl.float64))
    index = (magnitude > 0.25 * scale).to(tl.int32)
    index += (magnitude >= 0.75 * scale).to(tl.int32)
    index += (magnitude > 1.25 * scale).to(tl.int32)
    index += (magnitude >= 1.75 * scale).to(tl.int32)
    index += (magnitude > 2.5 * scale).to(tl.int32)
    index += (magnitude >= 3.5 * scale).to(tl.int32)
    index += (magnitude > 5.0 * scale).to(tl.int32)
    index = tl.where(scale > 0, index, 0)
    negative = w.to(tl.float32).to(tl.int32, bitcast=True) < 0
    return index | tl.where(negative, 8, 0)


@triton.jit
def pack(weight, stride_matrix, stride_outer, stride_block, stride_length, stride_inner, length_blocks, inner,
         n_blocks, tiles, block_size, tables, codes, packed, T: tl.constexpr):  # fmt: skip
    matrix, tile = _program(tiles)
    tables += matrix * TABLE
    weight += matrix * stride_matrix
    block = tile * T + tl.arange(0, T)
    inside = block < n_blocks
    offset = _block_offset(block, length_blocks, inner, stride_outer, stride_block, stride_inner)
    code = tl.load(codes + matrix * n_blocks + block, mask=inside, other=1).to(tl.int32)
    scale = (0.0 - tl.load(tables + NEGATIVE_SCALE + code)).to(tl.float64)
    half = block_size // 2
    out = (matrix * n_blocks + block // inner * inner) * half + block % inner
    for _ in range(half):
        low = _nibble(tl.load(weight + offset, mask=inside, other=0.0), scale)
        high = _nibble(tl.load(weight + offset + stride_length, mask=inside, other=0.0), scale)
        tl.store(packed + out, (low | high << 4).to(tl.uint8), mask=inside)
        offset += 2 * stride_length
        out += inner
