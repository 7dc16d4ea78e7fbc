"""The cases that every engine must answer as the oracle does: one list, made from seeds.

`rows` scales a case: engines that run in an interpreter take few.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from nvfp4sweep.formats import E2M1_VALUES, E4M3_VALUES

Array = npt.NDArray[Any]
COLUMNS = 96
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_TINY = float(np.finfo(np.float32).smallest_subnormal)


@dataclass(frozen=True)
class Case:
    """A weight and the arguments of the call."""

    name: str
    make: Callable[[np.random.Generator, int], Array]
    options: dict[str, Any] = field(default_factory=dict)

    def weight(self, rows: int) -> Array:
        return self.make(self.generator(), rows)

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(sum(self.name.encode()))

    def __str__(self) -> str:
        return self.name


def normal(rng: np.random.Generator, rows: int, columns: int = COLUMNS) -> Array:
    return rng.standard_normal((rows, columns)).astype(np.float32)


def scaled(factor: float) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, rows: (normal(rng, rows) * np.float32(factor)).astype(np.float32)


def from_levels(*levels: float) -> Callable[[np.random.Generator, int], Array]:
    """Signed draws from a few values: blocks that several scales represent equally well."""

    def make(rng: np.random.Generator, rows: int) -> Array:
        signs = rng.choice([-1.0, 1.0], size=(rows, COLUMNS))
        return (signs * rng.choice(levels, size=(rows, COLUMNS))).astype(np.float32)

    return make


def decades(rng: np.random.Generator, rows: int) -> Array:
    """Rows scaled over 12 decades."""
    exponents = np.linspace(-12, 0, rows)[:, None]
    return (normal(rng, rows) * 10.0**exponents).astype(np.float32)


def blocks_over_decades(rng: np.random.Generator, rows: int) -> Array:
    """Blocks from far below the smallest scale to the global amax: every E4M3 code is some block's."""
    factors = np.repeat(2.0 ** rng.uniform(-24, 0, (rows, COLUMNS // 16)), 16, axis=1)
    return (normal(rng, rows) * factors).astype(np.float32)


def sparse(rng: np.random.Generator, rows: int) -> Array:
    return normal(rng, rows) * (rng.random((rows, COLUMNS)) < 0.1)


def near_midpoints(rng: np.random.Generator, rows: int) -> Array:
    """Magnitudes one float32 step around E2M1 midpoints of an exact scale, with amax 6."""
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    w = rng.choice(midpoints, size=(rows, COLUMNS))
    w = np.nextafter(w, rng.choice(np.array([0.0, 9.0], np.float32), size=w.shape))
    w[:, ::16] = 6.0
    return w.astype(np.float32)


def rounder_edges(rng: np.random.Generator, rows: int) -> Array:
    """Blocks of points of one scale, E4M3 values, but for seven of 2 or 4 times that or the next scale over
    1.008, and a few float32 steps less: where a rounder that codes share enters its next binade."""
    values = E4M3_VALUES.astype(np.float32)
    blocks = rows * COLUMNS // 16
    code = rng.integers(48, 118, blocks)
    w = rng.choice(E2M1_VALUES, (blocks, 16)) * values[code, None]
    w[:, 0] = 6 * values[code]
    edge = rng.choice([2.0, 4.0], (blocks, 1)) * values[code + rng.integers(0, 2, blocks)][:, None] / 1.008
    below = edge * (1 - rng.integers(-1, 5, (blocks, 7)) * 2.0**-24)
    w[:, 9:] = below
    return (w * rng.choice([-1.0, 1.0], w.shape)).reshape(rows, COLUMNS).astype(np.float32)


def with_zero_blocks(rng: np.random.Generator, rows: int) -> Array:
    w = normal(rng, rows).reshape(rows, -1, 16)
    w[rng.random(w.shape[:2]) < 0.5] = 0.0
    w[0, 0] = -0.0
    return w.reshape(rows, COLUMNS)


def one_large_element(rng: np.random.Generator, rows: int) -> Array:
    """One element a block dwarfs the rest: the clipping end of the window."""
    w = normal(rng, rows) * np.float32(0.05)
    w[:, ::16] = rng.uniform(0.3, 1.0, w[:, ::16].shape)
    return w.astype(np.float32)


def as_dtype(dtype: npt.DTypeLike) -> Callable[[np.random.Generator, int], Array]:
    return lambda rng, rows: normal(rng, rows).astype(dtype)


def float16_ends(rng: np.random.Generator, rows: int) -> Array:
    """float16's subnormals and its largest value."""
    w = (normal(rng, rows) * 2.0**-20).astype(np.float16)
    w[0, 0] = np.finfo(np.float16).max
    return w


CASES = [
    Case("normal", normal),
    Case("uniform", lambda rng, rows: rng.uniform(-1, 1, (rows, COLUMNS)).astype(np.float32)),
    Case("laplace", lambda rng, rows: rng.laplace(size=(rows, COLUMNS)).astype(np.float32)),
    Case("student-t", lambda rng, rows: rng.standard_t(4, (rows, COLUMNS)).astype(np.float32)),
    Case("rows-over-12-decades", decades),
    Case("blocks-over-decades", blocks_over_decades),
    Case("blocks-over-decades-min-code-8", blocks_over_decades, {"min_code": 8}),
    Case("float16", as_dtype(np.float16)),
    Case("float16-ends", float16_ends),
    Case("bfloat16", as_dtype(ml_dtypes.bfloat16)),
    Case("float64", as_dtype(np.float64)),
    Case("integers-power-of-two-amax", from_levels(0, 1, 2, 3, 4, 5, 6, 7), {"global_amax": 8.0}),
    Case("integers-amax-2688", from_levels(*range(0, 49)), {"global_amax": 2688.0}),
    Case("zero-error-optimum", from_levels(0, 0.5, 1, 1.5, 2, 3, 4, 6), {"global_amax": 2688.0}),
    Case("common-levels", from_levels(0, 1.5, 3, 6), {"global_amax": 5.25}),
    Case("common-levels-odd-amax", from_levels(0, 1.5, 3, 6), {"global_amax": 4.8125}),
    Case("near-midpoints", near_midpoints, {"global_amax": 2688.0}),
    Case("rounder-edges", rounder_edges, {"global_amax": 2688.0}),
    Case("sparse", sparse),
    Case("sparse-bfloat16", lambda rng, rows: sparse(rng, rows).astype(ml_dtypes.bfloat16)),
    Case("one-large-element", one_large_element),
    Case("amax-below-half", normal, {"global_amax": 1.0}),
    Case("amax-far-below", normal, {"global_amax": 1e-6}),
    Case("amax-above", normal, {"global_amax": 100.0}),
    Case("amax-far-above", normal, {"global_amax": 1e5}),
    Case("amax-beyond-use", normal, {"global_amax": 1e9}),
    Case("amax-zero", normal, {"global_amax": 0.0}),
    Case("amax-subnormal", scaled(1e-37), {"global_amax": 1e-40}),
    Case("amax-largest", scaled(1e35), {"global_amax": FLOAT32_MAX}),
    Case("huge", scaled(6e37)),
    Case("tiny", scaled(1e-36)),
    Case("squares-overflow", scaled(2.0**63)),
    Case("squares-overflow-amax-above", scaled(2.0**63), {"global_amax": 2.0**68}),
    Case("squares-overflow-amax-below", scaled(2.0**63), {"global_amax": 2.0**61}),
    Case("squares-underflow", scaled(2.0**-62)),
    Case("squares-underflow-amax-below", scaled(2.0**-62), {"global_amax": 2.0**-66}),
    Case("slope-overflow-amax-below", scaled(2.0**-46), {"global_amax": 2.0**-51}),
    Case("slope-overflow", scaled(2.0**-54)),
    Case("subnormal", scaled(1e-41)),
    Case("smallest-subnormal", from_levels(0, FLOAT32_TINY, 3 * FLOAT32_TINY)),
    Case("zero-blocks", with_zero_blocks),
    Case("all-zero", lambda rng, rows: np.zeros((rows, COLUMNS), np.float32)),
    Case("one-block", lambda rng, rows: normal(rng, 1, 16)),
    Case("no-blocks", lambda rng, rows: np.zeros((0, 32), np.float32)),
    Case("no-columns", lambda rng, rows: np.zeros((3, 0), np.float32)),
    Case("one-dimension", lambda rng, rows: normal(rng, rows).reshape(-1)),
    Case("min-code-100", normal, {"min_code": 100}),
    Case("min-code-126", normal, {"min_code": 126}),
    Case("block-32", normal, {"block_size": 32}),
    Case("block-32-over-decades", blocks_over_decades, {"block_size": 32}),
    Case("block-8", normal, {"block_size": 8}),
    Case("block-3", normal, {"block_size": 3}),
    Case("block-1", lambda rng, rows: normal(rng, max(1, rows // 8)), {"block_size": 1}),
    Case("block-96", normal, {"block_size": 96}),
    Case("axis-0", lambda rng, rows: normal(rng, COLUMNS, rows + 3), {"axis": 0}),
    Case("axis-0-block-32", lambda rng, rows: normal(rng, COLUMNS, rows), {"axis": 0, "block_size": 32}),
    Case("axis-0-bfloat16", lambda rng, rows: as_dtype(ml_dtypes.bfloat16)(rng, rows).T, {"axis": 0}),
    Case("middle-axis", lambda rng, rows: normal(rng, rows).reshape(-1, 16, 3), {"axis": 1}),
    # Of the shape that most cases have: what compiles for each shape does not do so again.
    Case("transposed", lambda rng, rows: normal(rng, COLUMNS, rows).T),
    Case("strided", lambda rng, rows: normal(rng, 2 * rows, 2 * COLUMNS + 32)[::2, 16:-16:2]),
    Case("experts", lambda rng, rows: normal(rng, rows).reshape(2, -1, COLUMNS), {"batch_dims": 1}),
    Case(
        "experts-given-amax",
        lambda rng, rows: normal(rng, rows).reshape(2, -1, COLUMNS),
        {"batch_dims": 1, "global_amax": np.array([3.0, 0.7], np.float32)},
    ),
    Case(
        "experts-axis-1",
        lambda rng, rows: normal(rng, rows).reshape(2, -1, COLUMNS).swapaxes(1, 2),
        {"batch_dims": 1, "axis": 1},
    ),
    Case("two-batch-axes", lambda rng, rows: normal(rng, rows).reshape(2, 1, -1, COLUMNS), {"batch_dims": 2}),
]
