"""CUDA: a tile of T blocks, a block in each thread: where they lie, their elements, their E2M1 points."""

import triton
import triton.language as tl

from nvfp4sweep.triton_tables import AMAX, THRESHOLDS


@triton.jit
def pick(x, thread):
    """x where `thread` is true, which it is in one thread: of numbers, bits or pointers."""
    if x.dtype.is_ptr():
        address = tl.sum(tl.where(thread, x.to(tl.int64, bitcast=True), 0), axis=0)
        return address.to(x.dtype, bitcast=True)
    elif x.dtype == tl.int1:
        return tl.max((x & thread).to(tl.int32), axis=0) > 0
    else:
        return tl.sum(tl.where(thread, x, 0), axis=0)


@triton.jit
def next_thread(undecided, T: tl.constexpr):
    """(where the first undecided thread is, the threads' numbers for work on its block by all of them).

    The compiler cannot know that these are 0 .. T - 1: or it would work out addresses ahead of the sweep, and
    hold them all the while.
    """
    lane = tl.arange(0, T)
    number = tl.min(tl.where(undecided, lane, T), axis=0)
    return lane == number, lane + tl.minimum(number, 0)


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
def row_and_column(tile, tiles_per_row):
    """Of a tile, as int64."""
    tile = tile.to(tl.uint32)  # whose quotient takes fewer instructions
    width = tiles_per_row.to(tl.uint32)
    return (tile // width).to(tl.int64), (tile % width).to(tl.int64)


@triton.jit
def first_elements(weight, tile, row_stride, block_stride, tiles_per_row, outer_stride, length_blocks, inner,
                   inner_stride, ROWS: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Pointers to the first elements of a tile's blocks.

    ROWS 1: all blocks of a matrix are block_stride apart. 2: rows of tiles_per_row tiles are. 0: blocks
    lie [outer, length_blocks, inner], row_stride apart along the second. The two strides count vectors.
    """
    lane = tl.arange(0, T).to(tl.int64)
    row_stride *= VECTOR
    block_stride *= VECTOR
    if ROWS == 1:
        return weight + tile.to(tl.int64) * T * block_stride + lane * block_stride
    elif ROWS == 2:
        row, column = row_and_column(tile, tiles_per_row)
        return weight + row * row_stride + column * T * block_stride + lane * block_stride
    else:
        block = tile.to(tl.int64) * T + lane
        row = block // inner
        return (
            weight
            + (row // length_blocks) * outer_stride
            + (row % length_blocks) * row_stride
            + (block % inner) * inner_stride
        )


@triton.jit
def load_16(blocks, inside, top, step, BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):
    """Elements top .. top + 15 of each block, one vector [T] each; 0 where a block has ended."""
    w = ()
    if VECTOR > 1:
        for i in tl.static_range(16 // VECTOR):
            pointer = blocks[:, None] + (top + i * VECTOR + tl.arange(0, VECTOR))[None, :]
            w = w + _split(tl.load(pointer, mask=inside[:, None], other=0.0), T, VECTOR)
    else:
        i = tl.arange(0, 16)[None, :]
        exists = inside[:, None]
        if BLOCK_SIZE % 16 != 0:
            exists = exists & (top + i < BLOCK_SIZE)
        # Said to be contiguous down the tile, or threads would share a block; nothing is said of alignment,
        # so that no load is wider for it. One load, since each costs Triton up to 0.2 s to compile.
        pointers = tl.max_contiguous(blocks[:, None] + (top + i).to(tl.int64) * step, [T, 1])
        w = _split(tl.load(pointers, mask=exists, other=0.0), T, 16)
    return w


@triton.jit
def load_shared(pointer, N: tl.constexpr):
    """N floats, an even number, that all threads share, two a load: they are 8 bytes aligned."""
    values = ()
    for i in tl.static_range(0, N, 2):
        two = tl.load((pointer + i).to(tl.pointer_type(tl.int64), bitcast=True))
        low, high = two.to(tl.int32), (two >> 32).to(tl.int32)
        values = values + (low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True))
    return values


@triton.jit
def magnitude_of(w):
    """|w| as float32; of a bfloat16 by its bits, in fewer instructions."""
    if w.dtype == tl.bfloat16:
        return ((w.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.abs(w.to(tl.float32))


@triton.jit
def largest_of(x, START: tl.constexpr, COUNT: tl.constexpr):
    """Of x[START] .. x[START + COUNT - 1], by a tree: a chain would wait for each step."""
    if COUNT == 1:
        return x[START]
    else:
        return tl.maximum(largest_of(x, START, COUNT // 2), largest_of(x, START + COUNT // 2, COUNT // 2))


@triton.constexpr_function
def _sign_bit(i):
    """Of nibble i of an int32."""
    return 8 << (4 * i) if i < 7 else -(2**31)


@triton.jit
def point_thresholds(tables, code, T: tl.constexpr):
    """What an element must exceed to take the point 1 .. 7 of the grid at these codes, ascending."""
    first = (tables + THRESHOLDS + 8 * code)[:, None]
    columns = tl.arange(0, 4)[None, :]
    low = _split(tl.load(first + columns), T, 4)
    high = _split(tl.load(first + 4 + columns), T, 4)
    return low + (high[0], high[1], high[2])


@triton.jit
def nearest_point(magnitude, thresholds):
    q = tl.where(magnitude > thresholds[0], 0.5, 0.0)
    q = tl.where(magnitude > thresholds[1], 1.0, q)
    q = tl.where(magnitude > thresholds[2], 1.5, q)
    q = tl.where(magnitude > thresholds[3], 2.0, q)
    q = tl.where(magnitude > thresholds[4], 3.0, q)
    q = tl.where(magnitude > thresholds[5], 4.0, q)
    return tl.where(magnitude > thresholds[6], 6.0, q)


@triton.jit
def squared_error(blocks, inside, step, scale, thresholds,
                  BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """Summed in float64 element by element, as the oracle does."""
    wide = scale.to(tl.float64)
    error = tl.zeros([T], tl.float64)
    for top in range(0, BLOCK_SIZE, 16):
        w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
        for i in tl.static_range(16):
            magnitude = magnitude_of(w[i])
            q = nearest_point(magnitude, thresholds)
            residual = magnitude.to(tl.float64) - q.to(tl.float64) * wide
            error += residual * residual
    return error.to(tl.float32)


@triton.jit
def _packed(blocks, inside, top, step, thresholds,
            BLOCK_SIZE: tl.constexpr, VECTOR: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """The E2M1 codes of elements top .. top + 15, eight a word: the sign is kept on zeros too."""
    w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
    words = ()
    for half in tl.static_range(2):
        word = tl.zeros([T], tl.int32)
        for i in tl.static_range(8):
            x = w[8 * half + i].to(tl.float32)
            magnitude = tl.abs(x)
            # The code is the number of thresholds below: a search by halves, bit by bit.
            fours = magnitude > thresholds[3]
            twos = magnitude > tl.where(fours, thresholds[5], thresholds[1])
            after = tl.where(fours, thresholds[6], thresholds[2])
            before = tl.where(fours, thresholds[4], thresholds[0])
            ones = magnitude > tl.where(twos, after, before)
            word |= tl.where(fours, 4 << (4 * i), 0) | tl.where(twos, 2 << (4 * i), 0)
            word |= tl.where(ones, 1 << (4 * i), 0)
            word |= (x.to(tl.int32, bitcast=True) >> (28 - 4 * i)) & _sign_bit(i)
        words = words + (word,)
    return words


@triton.jit
def store_amax_and_code(amax, code, out, inside, tables, best):
    """Those that are not None, of the blocks with the numbers `out`."""
    if amax is not None:
        tl.store(amax + out, tl.load(tables + AMAX + best), mask=inside)
    if code is not None:
        tl.store(code + out, best.to(tl.uint8), mask=inside)


@triton.jit
def first_bytes(block, tile, first_block, inner, tiles_per_row,
                ROWS: tl.constexpr, INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                T: tl.constexpr):  # fmt: skip
    """Of the packed codes of blocks that lie as first_elements says, and how far apart a block's are.

    INNER: axes follow the blocked one, so that a block's bytes lie `inner` apart.
    """
    base = (first_block + block) * (BLOCK_SIZE // 2)
    byte_step = tl.full([], 1, tl.int64)
    if INNER:
        if ROWS == 0:
            row, column = block // inner, block % inner
        else:
            row, first = row_and_column(tile, tiles_per_row)
            column = first * T + tl.arange(0, T)
        base = (first_block + row * inner) * (BLOCK_SIZE // 2) + column
        byte_step = inner
    return base, byte_step


@triton.jit
def store_packed(packed, base, byte_step, blocks, inside, step, thresholds,
                 VECTOR: tl.constexpr, INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                 T: tl.constexpr):  # fmt: skip
    for top in range(0, BLOCK_SIZE, 16):
        low, high = _packed(blocks, inside, top, step, thresholds, BLOCK_SIZE, VECTOR, T)
        if BLOCK_SIZE % 16 == 0 and not INNER:
            words = packed.to(tl.pointer_type(tl.int32), bitcast=True)
            pointer = words + (base // 4 + top // 8)[:, None] + tl.arange(0, 2)[None, :]
            tl.store(pointer, tl.join(low, high), mask=inside[:, None])
        else:
            for i in tl.static_range(8):
                byte = ((low if i < 4 else high) >> (8 * (i % 4))) & 255
                exists = inside & (top + 2 * i < BLOCK_SIZE)
                pointer = packed + base + (top // 2 + i) * byte_step
                tl.store(pointer, byte.to(tl.uint8), mask=exists)
