"""CUDA: the sweep. A program handles one tile of blocks, of one matrix after the other.

An output that is None is not written.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from nvfp4sweep import window as proofs
from nvfp4sweep.triton_arithmetic import any_of
from nvfp4sweep.triton_blocks import (
    first_bytes,
    first_elements,
    largest_of,
    load_16,
    magnitude_of,
    point_thresholds,
    squared_error,
    store_amax_and_code,
    store_packed,
)
from nvfp4sweep.triton_search import code_window, exact_best, find_survivors, lowest_bit, normal_code_at_least
from nvfp4sweep.triton_tables import MAX_CODE, SCREEN_UPPER, SECOND_COPY, TABLE, matrix_at

CLIPPING_RATIO = tl.constexpr(proofs.CLIPPING_RATIO)


@triton.jit
def _sweep_tile(weight, tables, amax, code, error, packed, tile, matrix, outer_stride, row_stride,
                block_stride, step, inner_stride, length_blocks, inner, n_blocks, tiles_per_row, block_size,
                min_code, last_unhalved, least_base, lowest_ratio, relative_margin, absolute_margin,
                ROWS: tl.constexpr, VECTOR: tl.constexpr, INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                CANDIDATES: tl.constexpr, BELOW: tl.constexpr, T: tl.constexpr,
                OVERLAP: tl.constexpr):  # fmt: skip
    block = tile.to(tl.int64) * T + tl.arange(0, T)
    inside = block < n_blocks
    if ROWS == 2:  # of full tiles
        inside = tl.full([T], True, tl.int1)
    out = matrix * n_blocks + block
    blocks = first_elements(weight, tile, row_stride, block_stride, tiles_per_row, outer_stride,
                            length_blocks, inner, inner_stride, ROWS, VECTOR, T)  # fmt: skip

    magnitude = ()
    peak = tl.zeros([T], tl.float32)
    if CANDIDATES > 0:
        for top in tl.static_range(0, BLOCK_SIZE, 16):
            w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
            for i in tl.static_range(16):
                magnitude = magnitude + (magnitude_of(w[i]),)
        peak = largest_of(magnitude, 0, BLOCK_SIZE)
    else:
        for top in range(0, BLOCK_SIZE, 16):
            w = load_16(blocks, inside, top, step, BLOCK_SIZE, VECTOR, T)
            for i in tl.static_range(16):
                peak = tl.maximum(peak, magnitude_of(w[i]))
    if OVERLAP:  # with tabulate, up to here
        cuda.gdc_wait()
    best = tl.full([T], 0, tl.int32)
    origin = best
    survivors = best
    undecided = inside
    if CANDIDATES > 0:
        # Theorem 1 alone gives the last code here, and the first follows.
        last = tl.minimum(normal_code_at_least(peak * tl.load(tables + SCREEN_UPPER)) - 1, MAX_CODE)
        base = last - (CANDIDATES - 1)
        scales = tables + 2 * tl.maximum(base, 1)
        # Elements exceed 7 scales at the codes below last - 7, and at others only if last is 126.
        next_to_last = 0.0 - tl.load(scales + 2 * (CANDIDATES - 2))
        fits = (base >= least_base) & (peak <= CLIPPING_RATIO * next_to_last)
        octave_below = 0.0 - tl.load(scales + 2 * (CANDIDATES - 8))
        # Longer blocks always pay for the ends of the range: two searches take Triton four times as long
        # to compile as one.
        if BLOCK_SIZE > 16 or any_of(fits & (peak > CLIPPING_RATIO * octave_below)):
            # From a copy, or the compiler moves what both branches share to before them, and the
            # registers that hold it cost more than it saves.
            bits = find_survivors(magnitude, peak, scales + SECOND_COPY, lowest_ratio, relative_margin,
                              absolute_margin, CANDIDATES - 2, CANDIDATES, BELOW)  # fmt: skip
        else:
            bits = find_survivors(magnitude, peak, scales, lowest_ratio, relative_margin, absolute_margin,
                              CANDIDATES - 8, CANDIDATES, BELOW)  # fmt: skip
        survivors = tl.where(fits, bits, 0)
        origin = base - 1
        # Lanes without a block, and those that are still undecided, need a code to look up too.
        best = tl.where(survivors > 0, origin + lowest_bit(tl.maximum(survivors, 1)), MAX_CODE)
        undecided = inside & ((survivors == 0) | ((survivors & (survivors - 1)) != 0))
    if any_of(undecided):
        first, last = code_window(peak, tables, min_code, last_unhalved)
        origin = tl.where(survivors > 0, origin, first)
        exact = exact_best(blocks, undecided & (first != last), step, tables, origin, last, survivors,
                            block_size, BLOCK_SIZE, VECTOR, T)  # fmt: skip
        best = tl.where(undecided, tl.where(first == last, first, exact), best)

    store_amax_and_code(amax, code, out, inside, tables, best)
    if error is not None or packed is not None:
        scale = 0.0 - tl.load(tables + 2 * best)
        thresholds = point_thresholds(tables, best, T)
        if error is not None:
            found = squared_error(blocks, inside, step, scale, thresholds, BLOCK_SIZE, VECTOR, T)
            tl.store(error + out, found, mask=inside)
        if packed is not None:
            base, byte_step = first_bytes(block, tile, matrix * n_blocks, inner, tiles_per_row, ROWS, INNER,
                                          BLOCK_SIZE, T)  # fmt: skip
            store_packed(packed, base, byte_step, blocks, inside, step, thresholds, VECTOR, INNER,
                         BLOCK_SIZE, T)  # fmt: skip


@triton.jit(do_not_specialize=["matrix_stride", "row_stride", "block_stride", "step", "outer_stride",
                               "inner_stride", "length_blocks", "inner", "n_blocks", "matrices",
                               "tiles_per_row", "block_size", "min_code", "last_unhalved",
                               "least_base"])  # fmt: skip
def sweep(weight, starts, tables, amax, code, error, packed, matrix_stride: tl.int64, outer_stride: tl.int64,
          row_stride, block_stride, step, inner_stride: tl.int64,
          length_blocks: tl.int64, inner: tl.int64, n_blocks: tl.int64, matrices: tl.int32,
          tiles_per_row: tl.int32, block_size: tl.int32, min_code: tl.int32, last_unhalved: tl.int32,
          least_base: tl.int32, lowest_ratio, relative_margin, absolute_margin,
          ROWS: tl.constexpr, VECTOR: tl.constexpr, INNER: tl.constexpr, BLOCK_SIZE: tl.constexpr,
          CANDIDATES: tl.constexpr, BELOW: tl.constexpr, T: tl.constexpr,
          OVERLAP: tl.constexpr):  # fmt: skip
    """See triton_launch._sweep for the numbers.

    VECTOR: elements a load, to whose multiples the strides of rows and blocks are given. INNER: axes follow
    the blocked one. CANDIDATES codes, and one BELOW, are screened; 0 of blocks that do not fit in registers.
    OVERLAP: the kernel may start before tabulate has ended. Strides without a type are int32 where they fit,
    which saves instructions.
    """
    for i in range(tl.program_id(1), matrices, tl.num_programs(1)):
        matrix = tl.full([], 0, tl.int64) + i
        _sweep_tile(matrix_at(weight, starts, matrix, matrix_stride * VECTOR), tables + matrix * TABLE,
                    amax, code, error, packed, tl.program_id(0), matrix, outer_stride, row_stride,
                    block_stride, step, inner_stride, length_blocks, inner, n_blocks, tiles_per_row,
                    block_size, min_code, last_unhalved, least_base, lowest_ratio, relative_margin,
                    absolute_margin,
                    ROWS, VECTOR, INNER, BLOCK_SIZE, CANDIDATES, BELOW, T, OVERLAP)  # fmt: skip
